"""Yields the batches of all remaining epochs of a run."""

import time
from collections.abc import Iterable, Iterator

from mmgraph.checkpoints.progress import Progress
from mmgraph.data.batches import EdgeBatch
from mmgraph.data.images import ImageCounter
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.towers.token_source import TokenSource
from mmgraph.training.schedule import Schedule
from mmgraph.utils.log import log


class BatchStream:
    """Yields this rank's batches from the current step of the run until the run is finished.

    After the last batch of an epoch, ``progress`` must be advanced to the next epoch before another batch is requested.

    Args:
        loader: DataLoader over ``sampler``, prepared by Accelerate.
        sampler: sampler of global batches. A global batch has the edges of all ranks in one step.
        source: token source of the run. It may prefetch the tokens of later batches.
        progress, schedule: progress and schedule of the run.
        images: counts the image files of each batch.

    Attributes:
        data_wait: seconds that the training loop waited for the latest batch.
    """

    def __init__(
        self,
        loader: Iterable[EdgeBatch],
        sampler: GlobalBatchSampler,
        source: TokenSource,
        progress: Progress,
        schedule: Schedule,
        images: ImageCounter,
    ):
        self.loader, self.sampler, self.source = loader, sampler, source
        self.progress, self.schedule, self.images = progress, schedule, images
        self.data_wait = 0.0
        self._cache_failure_logged = False

    def __iter__(self) -> Iterator[EdgeBatch]:
        while not self.schedule.finished:
            self.sampler.begin(self.progress.epoch, self.progress.samples_in_epoch)
            wait_start = time.perf_counter()
            for batch in self.source.batches(self.loader):
                self.data_wait = time.perf_counter() - wait_start
                self._record_images(batch)
                yield batch
                wait_start = time.perf_counter()

    def _record_images(self, batch: EdgeBatch) -> None:
        if batch.image_status is not None:
            self.images.record(batch.unique, batch.image_status)
        if batch.cache_failure and not self._cache_failure_logged:  # a worker repeats its failure in every later batch
            self._cache_failure_logged = True
            log(f"no more images are written to the image cache ({batch.cache_failure}); training continues")
