"""SS-Text+: SS-Text for unbalanced images, prototypes set apart (Silva-Rodríguez et al. 2025)."""

from torch import Tensor

from vpt.methods._templates import unit
from vpt.methods.ss_text import SSText


class SSTextPlus(SSText):
    """λ is 1 / the class's number of images, and prototypes move away from their mean.

    A class without images keeps the templates' embedding, and is moved like the others.
    """

    def penalties(self, truth: Tensor) -> Tensor:
        """Penalty λ of each class (C,); without bound where it has no image."""
        return 1 / truth.sum(0)

    def blend(self, features: Tensor, truth: Tensor, penalties: Tensor) -> Tensor:
        """Prototypes (C, dim); the arguments are those of SS-Text's."""
        prototypes = super().blend(features, truth, penalties)
        return prototypes - unit(2 * prototypes - prototypes.mean(0))
