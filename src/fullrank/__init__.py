"""fullrank: full fine-tuning of language models, every weight updated, with evidence.

The layer law: cli > workflows > rooms (plan, data, train, evaluate, report) > machinery (generation > parallel, optim >
models, sequences) > hallway (recipe, loading, records, run, errors, units, meter, cases). Imports go down only; rooms never
import one another; the hallway imports no torch.
"""

from fullrank.errors import FullrankError
from fullrank.loading import load
from fullrank.recipe import Recipe
from fullrank.run import Run

__version__ = "0.1.0"
__all__ = ["FullrankError", "Recipe", "Run", "__version__", "load"]
