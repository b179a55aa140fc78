"""The training run: restore -> for batch -> step -> record -> save -> stop."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from mmgraph import checkpoints, state
from mmgraph.batches import build_loader
from mmgraph.config import Config
from mmgraph.demo_towers import is_stand_in
from mmgraph.errors import UserError
from mmgraph.graph import Graph
from mmgraph.loader.node_inputs import NodeInputs
from mmgraph.losses import contrastive_losses
from mmgraph.models.multimodal_graph_encoder import TrainedModule, tower_state
from mmgraph.order import GlobalBatchSampler
from mmgraph.recorder import Recorder
from mmgraph.resume import check_identity, find_state
from mmgraph.schedule import lr_at
from mmgraph.stopping import EXIT_CODE, StopRequest
from mmgraph.text_log import log
from mmgraph.towers import LiveTowers, fingerprint, load_tokenizer_and_processor, load_towers, widths
from mmgraph.world import on_main_process, together


class _Pending(NamedTuple):
    """A step whose losses the device may still be working on."""

    row: dict[str, Any]
    values: torch.Tensor  # (4,): total, mm and graph loss, and whether a rank was asked to stop; means over ranks


class Trainer:
    """One run, on this rank. Everything with a random part is set up from the seed alone.

    Args:
        config: the run's settings.
        accelerator: from :func:`mmgraph.world.build_accelerator`.
        graph: the run's data.

    Raises:
        UserError: towers that cannot be loaded, or an output folder that holds another run.
    """

    def __init__(self, config: Config, accelerator: Accelerator, graph: Graph):
        self.config, self.accelerator, self.graph = config, accelerator, graph
        self.output = config.output_folder
        self.identity = state.identity(config, graph.nodes_fingerprint, graph.edges_fingerprint)
        self.start_state = together(accelerator, lambda: find_state(config, self.identity))
        tokenizer, processor = together(accelerator, lambda: load_tokenizer_and_processor(config.model_name))
        inputs = NodeInputs(tokenizer, processor, config.cache_size, config.truncated_images)
        towers = together(accelerator, lambda: load_towers(config.model_name))
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        self.identity["towers"] = fingerprint(towers)
        if self.start_state is not None:
            check_identity(self.start_state, self.identity, f"{self.start_state} was made with other towers")
        self.source = LiveTowers(towers, accelerator.device, dtype)
        self._build(*widths(towers), inputs)
        self._restore()
        self.total_steps = self._count_steps()
        self.recorder = Recorder(config, accelerator, self.progress, self.total_steps)
        self.stop, self.stopping = StopRequest(), False
        self.pending: _Pending | None = None
        self.data_wait, self.recorded = 0.0, time.perf_counter()

    def _build(self, d_text: int, d_vis: int, inputs: NodeInputs) -> None:
        config = self.config
        torch.manual_seed(config.seed)
        module = TrainedModule(d_text, d_vis, config.fused_dim, config.proj_dim)
        optimizer = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.sampler = GlobalBatchSampler(len(self.graph.rows), config.global_batch_size, config.seed)
        self.samples_per_epoch = len(self.sampler) * config.global_batch_size
        loader = build_loader(
            self.graph.nodes, self.graph.rows, self.graph.paths, inputs, self.sampler, config.num_workers
        )
        self.trained, self.optimizer, self.loader = self.accelerator.prepare(module, optimizer, loader)
        if self.accelerator.num_processes > 1 and not isinstance(self.trained, DistributedDataParallel):
            raise UserError("the trained module is not wrapped for data parallel training: ranks would train alone")
        self.image_causes = np.zeros(len(self.graph.nodes), dtype=np.int8)

    def _restore(self) -> None:
        self.progress = state.Progress()
        if self.start_state is not None:
            path = self.start_state
            self.progress, trained = together(self.accelerator, lambda: state.read_state(path))
            state.restore(self.trained, self.optimizer.optimizer, trained)
            if self.accelerator.scaler is not None and self.progress.loss_scale is not None:
                self.accelerator.scaler.load_state_dict(self.progress.loss_scale)
            if path.resolve().parent != (self.output / "state").resolve():
                self.progress.metrics_bytes, self.progress.components = 0, {}  # a new folder, metrics and tracker
        elif self.config.init_from is not None:
            path = Path(self.config.init_from)
            trained, epoch = together(self.accelerator, lambda: self._read_original(path))
            state.restore(self.trained, self.optimizer.optimizer, trained)
            self.progress.epoch = epoch + 1

    def _read_original(self, path: Path) -> tuple[checkpoints.TrainedState, int]:
        """The trained part and the finished epochs of ``--init_from``, whose towers must be this run's."""
        checkpoint = checkpoints.read_checkpoint(path)
        for key, tensor in tower_state(self.source.towers).items():
            theirs = checkpoint.model_state_dict.get(key)
            if theirs is None or theirs.shape != tensor.shape or not torch.equal(theirs.float(), tensor.cpu()):
                raise UserError(
                    f"--init_from {path}: its towers are not --model_name {self.config.model_name}'s ({key})"
                )
        names = [name for name, _ in state.unwrapped(self.trained).named_parameters()]
        epoch = checkpoint.epoch or 0
        if epoch >= self.config.epochs:
            raise UserError(f"--init_from {path}: has finished epoch {epoch}; raise --epochs {self.config.epochs}")
        return checkpoints.trained_state(checkpoint, names, path), epoch

    def _count_steps(self) -> int:
        """The step that the run ends with."""
        left = (self.config.epochs - self.progress.epoch + 1) * self.samples_per_epoch - self.progress.samples_in_epoch
        total = self.progress.step + max(left, 0) // self.config.global_batch_size
        return min(total, self.config.max_steps or total)

    @property
    def done(self) -> bool:
        return self.progress.step >= self.total_steps

    def run(self) -> int:
        """Train to the end, or until asked to stop. Returns the exit code."""
        if self.done:
            log(f"finished: {self.output} is at step {self.progress.step:,}; raise --epochs or --max_steps to go on")
            return 0
        with self.recorder.opened(), self.stop.listening():
            self._say_hello()
            while not (self.done or self.stopping):
                for batch in self.batches():
                    self.record(self.step(batch))
                    if self.done or self.stopping:
                        break
                    if self.save_is_due:
                        self.save()
                self.save()
            self._say_goodbye()
        return EXIT_CODE if self.stopping and not self.done else 0

    def batches(self) -> Iterator[dict[str, Any]]:
        """This rank's batches of the epoch in progress, from where it stands; ``data_wait`` is the last one's."""
        self.sampler.begin(self.progress.epoch, self.progress.samples_in_epoch)
        asked = time.perf_counter()
        for batch in self.loader:
            self.data_wait = time.perf_counter() - asked
            yield batch
            asked = time.perf_counter()

    def step(self, batch: dict[str, Any]) -> torch.Tensor:
        """One optimizer step. Returns (3,) this rank's total, mm and graph loss, detached, on the device."""
        config = self.config
        self.image_causes[batch["distinct"]] = batch["image_causes"]
        distinct = self.trained(self.source.tokens(batch))  # (U, proj_dim) three times
        z_graph, z_text, z_vis = (z.index_select(0, batch["inverse"]) for z in distinct)  # (2b, proj_dim) each
        losses = contrastive_losses(z_graph, z_text, z_vis, config.temperature, config.graph_loss_weight)

        self.progress.step += 1
        self.progress.samples_in_epoch += config.global_batch_size
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.progress.step, config, self.total_steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(losses.total)
        if config.max_grad_norm:
            self.accelerator.clip_grad_norm_(self.trained.parameters(), config.max_grad_norm)
        self.optimizer.step()
        return torch.stack(losses).detach()

    def record(self, losses: torch.Tensor) -> None:
        """Note a step's losses, and write those of the step before it: the device is never waited for."""
        now = time.perf_counter()
        row = {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "lr": self.optimizer.param_groups[0]["lr"],
            "edges_per_s": self.config.global_batch_size / (now - self.recorded),
            "data_wait_s": self.data_wait,
        }
        if self.accelerator.optimizer_step_was_skipped:
            row["skipped"] = True
        self.recorded = now
        stop = losses.new_tensor([float(self.stop.requested or self.recorder.failure is not None)])
        pending = _Pending(row, self.accelerator.reduce(torch.cat([losses, stop]), "mean"))
        self.settle()
        self.pending = pending

    def settle(self) -> None:
        """Write the row of the last recorded step. The same on every rank, but for the writing."""
        if self.pending is None:
            return
        row, values = self.pending
        self.pending = None
        loss, loss_mm, loss_graph, stop = values.tolist()
        if not np.isfinite(loss):
            raise UserError(
                f"step {row['step']}: the loss is {loss}; the last state stays as it is. Try a lower --learning_rate, "
                "--max_grad_norm 1, or bf16 instead of fp16"
            )
        self.stopping = self.stopping or stop > 0
        losses = {"loss": loss, "loss_mm": loss_mm, "loss_graph": loss_graph}
        sums = self.progress.epoch_sums
        for name, value in {**losses, "steps": 1}.items():
            sums[name] = sums.get(name, 0) + value
        self.recorder.row({"step": row.pop("step"), "epoch": row.pop("epoch"), **losses, **row})

    @property
    def save_is_due(self) -> bool:
        """Between epochs; at an epoch's end a state is written anyway."""
        every, progress = self.config.save_every, self.progress
        return every > 0 and progress.step % every == 0 and progress.samples_in_epoch < self.samples_per_epoch

    def save(self) -> None:
        """Write the state, before it the epoch file at an epoch's end and the final file at the run's."""
        self.settle()
        progress = self.progress
        trained = state.consolidate(self.trained, self.optimizer.optimizer)
        progress.adam_step = trained.adam_step
        if self.accelerator.scaler is not None:
            progress.loss_scale = self.accelerator.scaler.state_dict()
        if progress.samples_in_epoch == self.samples_per_epoch:
            on_main_process(self.accelerator, lambda: self._end_epoch(trained))
            progress.epoch, progress.samples_in_epoch, progress.epoch_sums = progress.epoch + 1, 0, {}
        on_main_process(self.accelerator, lambda: self._write_state(trained))

    def _end_epoch(self, trained: checkpoints.TrainedState) -> None:
        sums, steps = self.progress.epoch_sums, int(self.progress.epoch_sums["steps"])
        means = {name: sums[name] / steps for name in ("loss", "loss_mm", "loss_graph")}
        self.recorder.epoch(self.progress.epoch, means, steps)
        checkpoint = checkpoints.Checkpoint(
            checkpoints.model_state(tower_state(self.source.towers), trained.weights),
            checkpoints.optimizer_state(trained, self.optimizer.param_groups[0]),
            self.progress.epoch,
            means["loss"],
        )
        checkpoints.write_checkpoint(checkpoints.epoch_file(self.output, self.progress.epoch), checkpoint)

    def _write_state(self, trained: checkpoints.TrainedState) -> None:
        if self.done:
            model = checkpoints.model_state(tower_state(self.source.towers), trained.weights)
            checkpoints.write_checkpoint(checkpoints.final_file(self.output), checkpoints.Checkpoint(model))
        self.progress.metrics_bytes = self.recorder.sync()
        state.write_state(
            self.output / "state", self.progress, trained, self.identity, self.config, self.config.keep_last
        )

    def _say_hello(self) -> None:
        if self.start_state is not None:
            log(f"resumed at step {self.progress.step:,} from {self.start_state}")
        elif self.config.init_from is not None:
            log(f"weights from {self.config.init_from}; begins at epoch {self.progress.epoch}")
        if is_stand_in(self.config.model_name):
            log(
                "the towers are untrained stand-ins with random weights, made with the demo graph; --model_name "
                f"{checkpoints.DEFAULT_MODEL} uses the real ones"
            )
        towers = sum(t.numel() for t in tower_state(self.source.towers).values())
        trained = sum(p.numel() for p in self.trained.parameters())
        size = (self.config.epochs - self.progress.epoch + 1) * 4 * (towers + 3 * trained) / 1e9
        log(
            f"{len(self.graph.nodes):,} nodes, {len(self.graph.rows):,} edges, {trained:,} trained and {towers:,} "
            f"frozen parameters; steps {self.progress.step:,} to {self.total_steps:,}; the epoch files will take "
            f"{size:.2f} GB in {self.output / 'checkpoints'}"
        )

    def _say_goodbye(self) -> None:
        self.recorder.finish(self.image_causes)
        if not self.done:
            log(f"stopped at step {self.progress.step:,}, state written; the same command goes on from there")
            return
        log(
            f"done: {checkpoints.final_file(self.output)}, with metrics.jsonl and training_log.txt in {self.output}. "
            f"Next: mmgraph encode {self.output} writes the embeddings"
        )
