"""Fourier prompts: VPT-deep with some of them Fourier-transformed (VFPT, Zeng et al. 2024)."""

import torch
from pydantic import Field
from torch import Tensor

from vpt.methods import vpt_deep


class Options(vpt_deep.Options):
    """Options of Fourier prompts."""

    fourier: float = Field(0.5, ge=0, le=1)  # the proportion that is transformed, rounded down


class FourierPrompts(vpt_deep.VPTDeep):
    """`prompts` as VPT-deep's; the first ones of each block enter as Re(FFT2(prompts))."""

    Options = Options

    def layer_prompts(self) -> Tensor:
        """Prompts (len(layers), num_tokens, width), transformed over tokens and width."""
        prompts = super().layer_prompts()
        count = int(self.options.fourier * self.options.num_tokens)
        if not count:  # there is no transform of nothing
            return prompts
        return torch.cat([torch.fft.fft2(prompts[:, :count]).real, prompts[:, count:]], 1)
