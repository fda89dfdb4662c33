"""How the trainers load data: samples are asked for with their epoch, and so are the same after resuming."""

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from ..data.pretraining import EpochSampler, StreamingPretrainingDataset


class LoadingMixin:
    """Of a `Trainer`: samplers that send the epoch along with the index, and streams that each process shares in."""

    def _get_dataloader(self, dataset, description, batch_size, *args, is_training=False, **kwargs) -> DataLoader:
        asked = self.args.dataloader_num_workers, self.args.dataloader_persistent_workers
        workers = self._num_workers(dataset, batch_size)
        self.args.dataloader_num_workers, self.args.dataloader_persistent_workers = workers, asked[1] and workers > 0
        try:
            loader = self._build_dataloader(dataset, description, batch_size, *args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_num_workers, self.args.dataloader_persistent_workers = asked
        # An iterator draws the seed of its workers, which none of them uses. Drawn from the global generator it would
        # move stochastic depth's, and not in the same way after resuming.
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return loader

    def _num_workers(self, dataset, batch_size: int) -> int:
        """As many as asked for, and none without a batch; for a stream, whose order depends on them, only if asked."""
        workers = self.args.dataloader_num_workers
        if not hasattr(dataset, "__len__"):
            return 0 if self.args.workers_by_default else workers
        return min(workers, max(1, len(dataset) // batch_size))

    def _build_dataloader(self, dataset, description, batch_size, *args, is_training, **kwargs) -> DataLoader:
        if is_training and isinstance(dataset, StreamingPretrainingDataset) and self.args.world_size > 1:
            # Each process reads its own share; accelerate would read the first one's alone and deal it out.
            loader = DataLoader(
                dataset,
                batch_size=batch_size,
                collate_fn=self.data_collator,
                num_workers=self.args.dataloader_num_workers,
                pin_memory=self.args.dataloader_pin_memory,
                persistent_workers=self.args.dataloader_persistent_workers,
                prefetch_factor=self.args.dataloader_prefetch_factor,
            )
            loader = prepare_data_loader(
                loader,
                self.accelerator.device,
                num_processes=1,
                process_index=0,
                put_on_device=True,
                dispatch_batches=False,
            )
        else:
            drop_last = self.args.dataloader_drop_last
            self.args.dataloader_drop_last = drop_last and is_training
            try:
                loader = super()._get_dataloader(
                    dataset, description, batch_size, *args, is_training=is_training, **kwargs
                )
            finally:
                self.args.dataloader_drop_last = drop_last
        return loader

    def _get_train_sampler(self, train_dataset=None) -> EpochSampler:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        needed = self.get_total_train_batch_size(self.args)
        if self.args.dataloader_drop_last and len(dataset) < needed:
            raise ValueError(
                f"The training data has {len(dataset)} pictures, fewer than the {needed} of one step (per-device "
                "batch x processes x accumulation). Choose a smaller --per_device_train_batch_size, or add pictures."
            )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        shard_ends = getattr(getattr(dataset, "pictures", None), "shard_ends", None)
        self.train_sampler = EpochSampler(len(dataset), seed=seed, shard_ends=shard_ends)
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset) -> EpochSampler:
        return EpochSampler(len(eval_dataset), shuffle=False)
