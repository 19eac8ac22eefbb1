"""ZS-LP: a linear probe that starts from class embeddings (Silva-Rodríguez et al. 2024)."""

from vpt.methods._templates import Prototypes


class ZSLP(Prototypes):
    """Logits are cosine similarities to learned prototypes, which start at the templates.

    Unlike there (jusiro/CLAP, trainers/adapters.py): names lose their underscores, and an epoch has
    each image once, in the view whose turn it is.
    """

    keeps_norms = True
