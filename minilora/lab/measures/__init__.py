"""What an adapter has become, in numbers: for a table, a plot or a claim. Nothing here trains or changes a model.

    from minilora.lab.measures import forgetting, spectrum, update_norms

Each function takes a model with adapters and the name of one, which is looked at alone, whatever is active: the model is put into eval
mode with this adapter for the time of the measurement, and then it is what it was, with its modes, gradients and random numbers. Base
layers may be dense or packed. The pictures are in ``minilora.report.lab_figures``. Read ``subject.py`` first.
"""

from minilora.lab.measures.descent import alignment
from minilora.lab.measures.divergence import Forgetting, forgetting
from minilora.lab.measures.intruders import Intruders, intruder_dimensions
from minilora.lab.measures.line import landscape
from minilora.lab.measures.norms import Norms, UpdateNorm, update_norms
from minilora.lab.measures.spectra import effective_rank, spectrum, stable_rank
from minilora.lab.measures.subspaces import similarity_grid, subspace_similarity

__all__ = [
    "Forgetting",
    "Intruders",
    "Norms",
    "UpdateNorm",
    "alignment",
    "effective_rank",
    "forgetting",
    "intruder_dimensions",
    "landscape",
    "similarity_grid",
    "spectrum",
    "stable_rank",
    "subspace_similarity",
    "update_norms",
]
