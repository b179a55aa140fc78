"""Batches of a run, over all remaining epochs."""

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
        sampler: sampler of global batches.
        source: token source of the run. It may prefetch tokens.
        progress, schedule: progress and schedule of the run.
        images: counts the image files of each batch.

    Attributes:
        data_wait: seconds that the training loop waited for the last batch.
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
            self.images.note(batch.unique, batch.image_status)
        if batch.cache_failure and not self._cache_failure_logged:  # each worker reports its failure in every batch
            self._cache_failure_logged = True
            log(f"the image cache stores no more images ({batch.cache_failure}); training continues without it")
