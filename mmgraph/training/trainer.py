"""The training run: restore -> for batch -> step -> record -> save -> stop."""

import math
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmgraph.checkpoints import consolidate as consolidation
from mmgraph.checkpoints import files as checkpoints
from mmgraph.checkpoints import state
from mmgraph.checkpoints.resume import find_state, read_start
from mmgraph.config import Config
from mmgraph.data.adjacency import Neighbors, pair_keys
from mmgraph.data.batches import EdgeBatch, build_loader
from mmgraph.data.graph import Graph
from mmgraph.data.images import SeenImages, is_black
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.collectives import from_main_process, together, write_on_main_process
from mmgraph.distributed.deepspeed import set_run
from mmgraph.distributed.launch import peak_memory_gb
from mmgraph.distributed.signals import EXIT_CODE, StopRequest
from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Evaluation, Table
from mmgraph.inference.node_outputs import NodeOutputs
from mmgraph.losses.contrastive import BatchNodes, contrastive_losses
from mmgraph.losses.negative_mask import false_negatives_of
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.cached import contents_of
from mmgraph.towers.clip import load_tokenizer_and_processor, load_tower_configs, read_tower_state
from mmgraph.towers.fingerprint import check_towers, towers_fingerprint
from mmgraph.towers.live import LiveTowers
from mmgraph.towers.store_plan import nodes_seen
from mmgraph.towers.token_source import open_source
from mmgraph.training.early_stopping import Best
from mmgraph.training.lr_schedule import lr_at
from mmgraph.training.nonfinite import NotFinite, hold_back, spread
from mmgraph.training.run_log import Recorder, describe_all_causes
from mmgraph.utils.log import log


class _Pending(NamedTuple):
    """A step whose losses the device may still be working on."""

    row: dict[str, Any]
    # (7,) or (9,): step()'s, image files read, bad ones, and whether a rank was asked to stop; means over the ranks
    values: torch.Tensor
    own: torch.Tensor  # step()'s, of this rank
    start: int  # edges of the epoch before the step's
    scaling: bool  # fp16 left the step out, in looking for its loss scale


class Trainer:
    """One run, on this rank. Everything with a random part is set up from the seed alone.

    Args:
        config: the run's settings.
        accelerator: from :func:`mmgraph.distributed.launch.build_accelerator`.
        graph: the run's data.

    Raises:
        UserError: towers that cannot be loaded, or an output folder that holds another run.
    """

    def __init__(self, config: Config, accelerator: Accelerator, graph: Graph):
        self.config, self.accelerator, self.graph = config, accelerator, graph
        self.output = config.output_folder
        self.identity = state.identity(config, graph.nodes_fingerprint, graph.edges_fingerprint)
        self.start_state = from_main_process(accelerator, lambda: find_state(config, self.identity))
        self.frozen = together(accelerator, lambda: read_tower_state(config.model_name))
        self.identity["towers"] = towers_fingerprint(self.frozen)
        check_towers(self.identity["towers"])
        self.progress, trained = from_main_process(
            accelerator, lambda: read_start(config, self.start_state, self.identity, self.frozen)
        )
        self.sampler = GlobalBatchSampler(len(graph.rows), config.global_batch_size, config.seed)
        self.samples_per_epoch = len(self.sampler) * config.global_batch_size
        done = self.progress.samples_in_epoch
        if done > self.samples_per_epoch or done % config.global_batch_size:
            raise UserError(
                f"{self.start_state}: {done:,} edges of an epoch of {self.samples_per_epoch:,}: not this run's"
            )
        self.total_steps = self._count_steps()
        tokenizer, processor = together(accelerator, lambda: load_tokenizer_and_processor(config.model_name))
        inputs = NodeInputs(tokenizer, processor, config.cache_size, config.truncated_images)
        self.cache_failure = ""  # of the shared image cache
        self._open_graph(inputs)
        self._build(inputs, trained)
        self.best = Best(config, self.progress.components, graph.held_out.fingerprint if graph.held_out else "")
        self.recorder = Recorder(config, accelerator, self.progress, self.start_state, self.total_steps)
        self.not_finite = NotFinite(config, accelerator, graph, self.progress)
        self.stop, self.stopping = StopRequest(config.stop_grace), False
        self.pending: _Pending | None = None
        self.saved: tuple[int, bool, bool] | None = None  # what of this run the newest state has
        self.data_wait, self.recorded = 0.0, time.perf_counter()

    def _open_graph(self, inputs: NodeInputs) -> None:
        """Find out what the run has to know of the graph's nodes, and where their tokens come from."""
        config, accelerator, graph = self.config, self.accelerator, self.graph
        contents, neighbors = None, None
        if config.tower_cache != "off" or config.false_negatives != "keep":
            contents = contents_of(config, accelerator, graph)
        if config.false_negatives == "mask_neighbors" or graph.held_out is not None:
            neighbors = Neighbors(torch.from_numpy(pair_keys(graph.rows, len(graph.nodes))), len(graph.nodes))
        self.false_negatives = false_negatives_of(config, len(graph.nodes), contents, neighbors, accelerator.device)
        self.evaluation: Evaluation | None = None
        if graph.held_out is not None and neighbors is not None:
            self.evaluation = Evaluation(accelerator, neighbors, graph.held_out, config.seed)
        planned_nodes = nodes_seen(config, graph, max(0, self.total_steps - self.progress.step))
        towers = self.identity["towers"]
        self.source = open_source(config, accelerator, graph, contents, inputs, towers, planned_nodes)
        self.outputs = NodeOutputs(graph.nodes, graph.paths, inputs, self.source, config.num_workers)

    def _build(self, inputs: NodeInputs, trained: checkpoints.TrainedState | None) -> None:
        config, accelerator = self.config, self.accelerator
        torch.manual_seed(config.seed)
        d_text, d_vis = (tower.hidden_size for tower in load_tower_configs(config.model_name))
        module = TrainedModule(d_text, d_vis, config.fused_dim, config.proj_dim)
        self.trained_parameters = sum(parameter.numel() for parameter in module.parameters())
        if trained is not None:
            module.load_state_dict(trained.weights)
        optimizer = torch.optim.AdamW(
            module.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=accelerator.scaler is None,  # the loss scaler would not learn of a step that it skips
        )
        live = inputs if isinstance(self.source, LiveTowers) else None
        loader = build_loader(self.graph, live, self.sampler, config.num_workers, config.collective_timeout)
        edges = config.global_batch_size // accelerator.num_processes  # of a step, on this rank
        self.micro_batches = math.ceil(edges / (config.micro_batch_size or edges))
        set_run(accelerator, edges, config.max_grad_norm)
        self.trained, self.optimizer, self.loader = accelerator.prepare(module, optimizer, loader)
        if accelerator.num_processes > 1 and self.trained is module:
            raise UserError("the trained module is not wrapped for data parallel training: ranks would train alone")
        if trained is not None:
            consolidation.restore(self.trained, self.optimizer.optimizer, trained)
        if self.progress.loss_scale is not None:
            consolidation.set_loss_scale(accelerator, self.trained, self.progress.loss_scale)
        self.images = SeenImages(len(self.graph.nodes))

    def _count_steps(self) -> int:
        """The step that the run ends with."""
        left = (self.config.epochs - self.progress.epoch + 1) * self.samples_per_epoch - self.progress.samples_in_epoch
        total = self.progress.step + max(left, 0) // self.config.global_batch_size
        return min(total, self.config.max_steps or total)

    @property
    def done(self) -> bool:
        return self.progress.step >= self.total_steps or self.best.exhausted

    def run(self) -> int:
        """Train to the end, or until asked to stop. Returns the exit code."""
        if self.done and not self.unevaluated:
            limit = "--early_stopping_patience" if self.best.exhausted else "--epochs or --max_steps"
            log(f"finished: {self.output} is at step {self.progress.step:,}; raise {limit} to go on")
            return 0
        with self.stop.listening(), self.recorder.opened():  # not to be cut off in writing its last lines
            self._say_hello()
            if self.progress.step == 0 or self.unevaluated:
                self.evaluate()
            if self.done:
                self.save()
            while not (self.done or self.stopping):
                for batch in self.batches():
                    self.record(self.step(batch))
                    if self.evaluation_is_due:
                        self.save()  # first: an evaluation that does not end costs no step
                        self.evaluate()
                    if self.done or self.stopping:
                        break
                    if self.save_is_due:
                        self.save()
                self.save()
            self._say_goodbye()
            if self.config.report and self.done and not any(gather_object([self.stop.requested])):
                self.report()
        return EXIT_CODE if self.stopping and not self.done else 0

    def batches(self) -> Iterator[EdgeBatch]:
        """This rank's batches of the epoch in progress, from where it stands; ``data_wait`` is the last one's."""
        self.sampler.begin(self.progress.epoch, self.progress.samples_in_epoch)
        asked = time.perf_counter()
        for batch in self.source.batches(self.loader):
            self.data_wait = time.perf_counter() - asked
            self._tell_of_cache(batch.cache_failure)
            yield batch
            asked = time.perf_counter()

    def _tell_of_cache(self, failure: str) -> None:
        """One line for whichever worker of the main process first fails to write to the shared image cache."""
        if failure and not self.cache_failure:
            self.cache_failure = failure
            log(f"the image cache keeps no more pictures ({failure}); training goes on")

    def step(self, batch: EdgeBatch) -> torch.Tensor:
        """One optimizer step. Returns (4,) on the device: this rank's total, mm and graph loss, and the gradient norm.

        The norm (L2, over all parameters and ranks, before clipping) is -1 where the backend does not tell it. Where
        false negatives are left out, (6,): how many for a query in mm and graph loss, on average.
        """
        config = self.config
        self.images.note(batch.unique, batch.image_status)
        tokens = self.source.tokens(batch, self.micro_batches)
        distinct = self.trained(tokens, self.micro_batches)  # (U, proj_dim) three times
        z_graph, z_text, z_vis = (z.index_select(0, batch.inverse) for z in distinct)  # (2b, proj_dim) each
        losses = contrastive_losses(
            z_graph,
            z_text,
            z_vis,
            config.temperature,
            config.graph_loss_weight,
            self.false_negatives,
            self._nodes(batch),
        )

        self.progress.step += 1
        self.progress.samples_in_epoch += config.global_batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.progress.step, config, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(spread(losses.total))  # under DeepSpeed with clipping and the step
        norm = self._clip_gradients()
        self.optimizer.step()
        return torch.stack([losses.total, losses.mm, losses.graph, norm, *losses.left_out]).detach()

    def _nodes(self, batch: EdgeBatch) -> BatchNodes | None:
        if self.false_negatives is None:
            return None
        black = torch.from_numpy(is_black(batch.image_status, self.config.truncated_images))  # (U,)
        return BatchNodes(batch.rows, black.to(batch.rows.device)[batch.inverse])

    def _clip_gradients(self) -> torch.Tensor:
        if hasattr(self.trained, "get_global_grad_norm"):  # DeepSpeed (Accelerate's own call would wait for the device)
            norm = self.trained.get_global_grad_norm()
            return torch.as_tensor(-1 if norm is None else norm, device=self.accelerator.device).float()
        # An infinite limit leaves the gradients as they are, and tells their norm.
        norm = self.accelerator.clip_grad_norm_(self.trained.parameters(), self.config.max_grad_norm or math.inf)
        if self.accelerator.scaler is None:  # which holds such a step back itself
            hold_back(self.optimizer.optimizer, norm)
        return norm

    def record(self, values: torch.Tensor) -> None:
        """Note a step's values, and write those of the step before it: the device is never waited for."""
        now, config = time.perf_counter(), self.config
        seconds = now - self.recorded
        row = {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "edges_per_s": config.global_batch_size / seconds,
            "edges_per_s_per_process": config.global_batch_size / seconds / self.accelerator.num_processes,
            "data_wait_s": self.data_wait,
            "data_wait_share": self.data_wait / seconds,
            "peak_memory_gb": peak_memory_gb(self.accelerator.device),
        }
        scale = None
        if self.accelerator.optimizer_step_was_skipped:
            row["skipped"] = True
            scale = consolidation.loss_scale(self.accelerator, self.trained)
        self.recorded = now
        ends = self.stop.requested or self.recorder.failure is not None
        counts = [values.new_full((1,), number) for number in (self.images.read, self.images.bad, ends)]
        means = self.accelerator.reduce(torch.cat([values, *counts]), "mean")  # new_full: no copy to wait for
        start = self.progress.samples_in_epoch - config.global_batch_size
        scaling = scale is not None and scale["scale"] >= 1  # below, it is not the scale
        pending = _Pending(row, means, values, start, scaling)
        self.settle()
        self.pending = pending
        self.stop.step_finished()

    def settle(self) -> None:
        """Write the row of the last recorded step. The same on every rank, but for the writing."""
        if self.pending is None:
            return
        row, values, own, start, scaling = self.pending
        self.pending = None
        loss, loss_mm, loss_graph, norm, *left_out, read, bad, stop = values.tolist()
        self._check_images(read, bad)
        if stop > 0:
            self.stopping = True
            self.stop.begin()
        losses = {"loss": loss, "loss_mm": loss_mm, "loss_graph": loss_graph}
        if self.not_finite.left_out({**row, **losses}, norm, own[0], start, scaling):
            row["skipped"] = True
            losses = {name: value if math.isfinite(value) else None for name, value in losses.items()}
        else:
            sums = self.progress.epoch_sums
            for name, value in {**losses, "steps": 1}.items():
                sums[name] = sums.get(name, 0) + value
        row["grad_norm"] = norm if math.isfinite(norm) and norm >= 0 else None
        row |= dict(zip(("false_negatives_mm", "false_negatives_graph"), left_out, strict=False))
        row = {"step": row.pop("step"), "epoch": row.pop("epoch"), **losses, **row}
        if row["step"] == self.progress.step and self.evaluation_is_due:
            self.progress.components["unevaluated"] = row  # is written when it has been
        else:
            self.recorder.row(row)

    def _check_images(self, read: float, bad: float) -> None:
        """Means over the ranks; of few images, a share says nothing."""
        count, limit = read * self.accelerator.num_processes, self.config.max_bad_images
        if bad <= limit * read or count < min(100, len(self.graph.nodes) // 2):
            return
        told = describe_all_causes(self.images.causes)
        raise UserError(
            f"{bad / read:.0%} of the image files seen are missing or not whole ({told}), more than --max_bad_images "
            f"{limit:g}; see to --image_root and the files, or raise it"
        )

    @property
    def evaluation_is_due(self) -> bool:
        every, step = self.config.eval_every, self.progress.step
        due = step >= self.total_steps or (every > 0 and step % every == 0)
        return due and self.evaluation is not None

    @property
    def unevaluated(self) -> dict[str, Any] | None:
        """The row of a step that is still to be evaluated: the run was killed or stopped before that."""
        return self.progress.components.get("unevaluated")

    def evaluate(self) -> None:
        """Rank the held-out edges, if there are any: a line, metrics of the step's row, ``evaluation.json``."""
        if self.stopping:
            return  # the same command begins with it
        row, table, step = self.progress.components.pop("unevaluated", None), None, self.progress.step
        if self.evaluation is not None:
            with self.stop.aside():
                module = self._whole_module()
                table = self._rank(module)
        self._write(lambda: self.recorder.evaluation(step, row, table))
        if table is not None and self.best.improves(step, table["embeddings"]):
            best = checkpoints.Checkpoint(checkpoints.model_state(self.frozen, module.state_dict()))
            path = checkpoints.best_file(self.output)
            self._write(lambda: checkpoints.write_checkpoint(path, best))
        self.recorded = time.perf_counter()  # the next step's time begins here

    def _whole_module(self) -> TrainedModule:
        """What is trained, of any backend, in float32 on this rank's device."""
        weights = consolidation.consolidate(self.trained, self.optimizer.optimizer).weights
        return TrainedModule.from_weights(weights).to(self.accelerator.device)

    def _rank(self, module: TrainedModule) -> Table:
        assert self.evaluation is not None
        try:
            return self.evaluation.evaluate(module.embeddings, self.outputs)
        except UserError as error:
            remedy = "try a lower --learning_rate, or --max_grad_norm 1"
            raise UserError(f"evaluation at step {self.progress.step}: {error}; {remedy}") from None

    @property
    def save_is_due(self) -> bool:
        """Between epochs; at an epoch's end a state is written anyway."""
        every, progress = self.config.save_every, self.progress
        return every > 0 and progress.step % every == 0 and progress.samples_in_epoch < self.samples_per_epoch

    def save(self) -> None:
        """Write the state, before it the epoch file at an epoch's end and the final file at the run's."""
        self.settle()
        if self.done:
            self.stop.begin()  # a stop that comes now is what happens anyway
        progress = self.progress
        content = progress.step, self.unevaluated is None, self.done
        if content == self.saved:
            return
        with self.stop.unhurried():
            trained = consolidation.consolidate(self.trained, self.optimizer.optimizer)
            progress.adam_step = trained.adam_step
            progress.loss_scale = consolidation.loss_scale(self.accelerator, self.trained)
            if progress.samples_in_epoch == self.samples_per_epoch:
                self._write(lambda: self._end_epoch(trained))
                progress.epoch, progress.samples_in_epoch, progress.epoch_sums = progress.epoch + 1, 0, {}
            self._write(lambda: self._write_state(trained))
        self.saved = content

    def _write(self, write: Callable[[], object]) -> None:
        write_on_main_process(self.accelerator, self.output, write)

    def _end_epoch(self, trained: checkpoints.TrainedState) -> None:
        sums, steps = self.progress.epoch_sums, int(self.progress.epoch_sums.get("steps", 0))
        means = {name: sums[name] / steps if steps else math.nan for name in ("loss", "loss_mm", "loss_graph")}
        self.recorder.epoch(self.progress.epoch, means, steps)
        checkpoint = checkpoints.Checkpoint(
            checkpoints.model_state(self.frozen, trained.weights),
            checkpoints.optimizer_state(trained, self.optimizer.param_groups[0]),
            self.progress.epoch,
            means["loss"],
        )
        checkpoints.write_checkpoint(checkpoints.epoch_file(self.output, self.progress.epoch), checkpoint)

    def _write_state(self, trained: checkpoints.TrainedState) -> None:
        if self.done:
            model = checkpoints.model_state(self.frozen, trained.weights)
            checkpoints.write_checkpoint(checkpoints.final_file(self.output), checkpoints.Checkpoint(model))
        self.progress.metrics_bytes = self.recorder.sync()
        state.write_state(
            self.output / "state", self.progress, trained, self.identity, self.config, self.config.keep_last
        )

    def report(self) -> None:
        """Write ``report.html``, and show the trackers what is on it. All is saved: whatever fails here is a line."""
        config, accelerator = self.config, self.accelerator
        later = f"mmgraph report {self.output} makes one"
        if self.evaluation is None and 2 * self.progress.step * config.global_batch_size < len(self.graph.nodes):
            log(f"no report of so few steps: {later}, and embeds all nodes")
            return
        log(f"report: embedding {len(self.graph.nodes):,} nodes; Ctrl-C leaves it out")
        try:
            with self.stop.heeded():
                # scikit-learn and Bokeh cost seconds
                make = together(accelerator, lambda: import_module("mmgraph.report.make"))
                figures = make.end_of_run(config, accelerator, self.graph, self._whole_module(), self.outputs)
                if figures is not None:
                    self.recorder.trackers.show(self.progress.step, *figures, self.output / make.FILE)
        except Exception as error:
            log(f"no report ({type(error).__name__}: {' '.join(str(error).split())}); {later}")
        except KeyboardInterrupt:
            log(f"no report: interrupted; {later}")

    def _say_hello(self) -> None:
        frozen = sum(tensor.numel() for tensor in self.frozen.values())
        self.recorder.hello(self.graph, self.trained_parameters, frozen)

    def _say_goodbye(self) -> None:
        told = f"best: {self.best}, {checkpoints.best_file(self.output)}" if self.best.found else ""
        if self.best.exhausted:
            told = f"no better one in {self.config.early_stopping_patience} evaluations: stopped early; {told}"
        self.recorder.goodbye(self.images.causes, self.done, told)
