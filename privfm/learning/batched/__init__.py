"""Many clients through one frozen model in one pass (transformers with LoRA or a linear head).

- `prepared`: checks a model and its data, and gives the engine.
- `problems`: what stands against it, by module.
- `BatchedDescent`: the engine.
"""

from privfm.learning.batched.engine import BatchedDescent
from privfm.learning.batched.prepare import prepared
from privfm.learning.batched.refusals import problems

__all__ = ["BatchedDescent", "prepared", "problems"]
