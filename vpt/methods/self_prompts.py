"""Prompts that start as pooled or clustered patch tokens (SPT-deep, Wang et al. 2024)."""

from collections.abc import Iterable
from typing import Literal

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor
from torch.nn import functional as F

from vpt.errors import InputError
from vpt.methods import vpt_deep
from vpt.methods.base import Batch, Epoch


class Options(vpt_deep.Options):
    """Options of self-prompts."""

    project: None = None
    pooling: Literal["mean", "kmeans"] = "mean"  # of the training images' patch tokens


class SelfPrompts(vpt_deep.VPTDeep):
    """VPT-deep whose prompts `fit` draws from the tokens that enter each block unprompted."""

    Options = Options

    def before_epoch(self, at: Epoch) -> None:
        """Set the prompts before the first epoch, then the head."""
        if at.number == 0:
            pool = {"mean": self._means, "kmeans": self._centers}[self.options.pooling]
            with torch.no_grad():
                self.prompts.copy_(pool(at.batches))
        super().before_epoch(at)

    def _means(self, batches: Iterable[Batch]) -> Tensor:
        """Means over images of each of num_tokens stretches of patches, in reading order."""
        total, count = torch.zeros_like(self.prompts), 0
        for images, *_ in batches:
            for mean, patches in zip(total, self._patches(images), strict=True):
                stretches = F.adaptive_avg_pool1d(patches.mT, self.options.num_tokens)
                mean += stretches.mT.sum(0)
            count += len(images)
        return total / count

    def _centers(self, batches: Iterable[Batch]) -> Tensor:
        """Centres of num_tokens clusters of all patches."""
        clusters = [MiniBatchKMeans(self.options.num_tokens, random_state=0) for _ in self.layers]
        for images, *_ in batches:
            for cluster, patches in zip(clusters, self._patches(images), strict=True):
                if patches.shape[:2].numel() >= self.options.num_tokens:
                    cluster.partial_fit(patches.flatten(0, 1).cpu().numpy())
        if not hasattr(clusters[0], "cluster_centers_"):
            raise InputError(
                f"method.num_tokens={self.options.num_tokens}: more than the patches of a batch: "
                "lower it, or give method.pooling=mean"
            )
        return torch.stack([torch.from_numpy(cluster.cluster_centers_) for cluster in clusters])

    def _patches(self, images: Tensor) -> list[Tensor]:
        """Patch tokens (B, patches, width) that enter each prompted block without prompts."""
        tokens, patches = self.backbone.embed(images.to(self.prompts.device)), []
        for index in range(self.layers[-1] + 1):
            tokens = self.backbone.enter(index, tokens, 0)
            if index in self.layers:
                own = tokens[:, self.backbone.num_prefix_tokens :]
                patches.append(F.pad(own, (0, self.prompts.shape[-1] - own.shape[-1])))
            tokens = self.backbone.block(index, tokens)
        return patches
