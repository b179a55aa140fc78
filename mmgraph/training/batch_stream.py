"""The batches of a run, epoch after epoch."""

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
    """Iterates over this rank's batches from where the run stands, until the run is finished.

    The progress must be in the next epoch when the first batch of that is asked for.

    Args:
        loader: prepared by Accelerate, over ``sampler``.
        sampler: of global batches.
        source: of the towers' tokens, which reads ahead.
        progress, schedule: of the run.
        images: the image files of each batch are noted in it.

    Attributes:
        data_wait: seconds that the last batch was waited for.
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
        self._cache_failed = False

    def __iter__(self) -> Iterator[EdgeBatch]:
        while not self.schedule.finished:
            self.sampler.begin(self.progress.epoch, self.progress.samples_in_epoch)
            asked = time.perf_counter()
            for batch in self.source.batches(self.loader):
                self.data_wait = time.perf_counter() - asked
                self._note(batch)
                yield batch
                asked = time.perf_counter()

    def _note(self, batch: EdgeBatch) -> None:
        if batch.image_status is not None:
            self.images.note(batch.unique, batch.image_status)
        if batch.cache_failure and not self._cache_failed:  # of any worker of the main process
            self._cache_failed = True
            log(f"the image cache keeps no more pictures ({batch.cache_failure}); training goes on")
