"""Inputs and labels read off a linear layer's update: two lines of algebra, no optimisation.

For logits z = W x + b, the gradient of output i is dL/db_i = dL/dz_i for the bias and dL/dW_i = (dL/dz_i) x for the
weight's row: their ratio is the input. Under softmax cross-entropy dL/dz_i = p_i - [i = label], negative for the label
alone. A layer's update after one step of plain SGD is the same gradient times `-learning_rate`.

Who can do it: whoever sees one client's change of the layer, be it the server, a listener or another client. Nothing
else is used: no data, no other part of the model, not the learning rate, not the number of examples.

NaN marks what the attacker does not see (encrypted, masked, not sent). It stays NaN in what follows from it; nothing is
guessed, and no function fills in zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from privfm.checks import non_negative, require


def layer_inputs(weight: Tensor, bias: Tensor, least: float = 0.0) -> Tensor:
    """What each output says of the layer's input: its row of the weight's change over its bias's change.

    | behind the change              | row i of the result                                                       |
    |--------------------------------|---------------------------------------------------------------------------|
    | one example, one step          | the input, to rounding; all rows agree                                    |
    | several examples or positions  | their inputs' mean, weighted by dL/dz_i of each: weights sum to 1 and may |
    |                                | be negative. The rarer a label, the closer its row to its one example     |
    | several local steps            | the same, over all steps; inputs that the steps have moved are mixed in   |
    | momentum of one client's steps | as several steps                                                          |
    | Adam, per-coordinate clipping  | nothing useful: the ratio is gone, its sign is left                       |
    | added noise                    | noise over `bias[i]`                                                      |

    Sign and scale cancel: gradients, updates and clipped updates give the same.

    Args:
      weight: change of the weight, `(c, k)`.
      bias: change of the bias, `(c,)`.
      least: rows whose bias changed by no more than this, in absolute value, are NaN: their ratio is rounding or noise.

    Returns:
      `(c, k)`, NaN where weight or bias is unknown, or the bias did not change.

    Raises:
      InvalidArgument: shapes do not fit, or entries are not of a float type.

    Source: Phong, Aono, Hayashi, Wang, Moriai, "Privacy-preserving deep learning via additively homomorphic
    encryption", IEEE TIFS 2018, section 3 (gradients leak information).

    >>> one = torch.tensor([0.5, -2.0])  # the input
    >>> errors = torch.tensor([0.3, -0.7, 0.4])  # p - onehot
    >>> layer_inputs(errors[:, None] * one, errors)[0].tolist()
    [0.5, -2.0]
    """
    _require_layer(weight, bias)
    non_negative("least", least)
    usable = bias.masked_fill(~(bias.abs() > least), torch.nan)
    return weight / usable[:, None]


def shared_input(weight: Tensor, bias: Tensor) -> Tensor:
    """The one input that explains all outputs best, `(k,)`, from as many of them as are known.

    Least squares over the outputs known in a column: `sum_i bias_i weight_ij / sum_i bias_i^2`. With one example behind
    the change every output gives the same number, so that one known entry of a column's c is enough, and hiding a
    random share s of the weight hides s^c of the input. With several examples it is some mean of them.

    Args:
      weight: change of the weight, `(c, k)`.
      bias: change of the bias, `(c,)`.

    Returns:
      `(k,)`, NaN in columns of which nothing is known; in the type of `weight`.

    Raises:
      InvalidArgument: shapes do not fit, or entries are not of a float type.

    Source: `layer_inputs`; the least squares are ours.
    """
    _require_layer(weight, bias)
    factors = bias.double()[:, None].expand(weight.shape)
    known = ~(weight.isnan() | factors.isnan())
    factors = factors.where(known, 0.0)
    products = factors * weight.double().where(known, 0.0)
    return (products.sum(0) / factors.square().sum(0)).to(weight.dtype)  # 0 / 0 is NaN: nothing known


def labels_present(bias_update: Tensor) -> Tensor:
    """Labels that were certainly among the examples, `(c,)` bool: those whose bias has risen.

    After one step, the bias of a label that no example has goes down: its gradient is a mean of probabilities. So what
    is found is never wrong after one step under softmax cross-entropy without weight decay; with several examples a
    label may be there and not be found (few examples of it, and a model that predicts it for others), with one example
    it is found always. After several steps, or with label smoothing, it is a good guess.

    Args:
      bias_update: what was added to the bias of the last layer, `(c,)`. Of a gradient, take the negative.

    Returns:
      `(c,)`; False where the bias is unknown, of which nothing follows.

    Raises:
      InvalidArgument: not `(c,)`, or not of a float type.

    Source: Zhao, Mopuri, Bilen, "iDLG: improved deep leakage from gradients", 2020, for one example; the sign of a mean
    of gradients follows from it.

    >>> labels_present(torch.tensor([-0.3, 0.7, -0.4])).tolist()
    [False, True, False]
    """
    require(
        bias_update.dim() == 1 and bias_update.dtype.is_floating_point,
        f"bias_update has shape {tuple(bias_update.shape)} and type {bias_update.dtype}: expected (c,) of a float type",
    )
    return bias_update > 0


def label_of_one(weight: Tensor) -> int | None:
    """The label of a single example from the last layer's weight alone, without its bias.

    The rows are multiples of one vector, and only the label's multiple has the other sign: the label is the one row
    whose inner product with every other is negative. Works on gradients and updates, of one example and one step.

    Args:
      weight: change of the weight, `(c, k)`; products are taken over the columns known in both rows.

    Returns:
      The label; None where no row or more than one could be it (two classes, too little known). Of several examples
      the answer means nothing.

    Raises:
      InvalidArgument: not `(c, k)`, or not of a float type.

    Source: Zhao, Mopuri, Bilen, "iDLG: improved deep leakage from gradients", 2020 (labels from the last layer's
    weight).

    >>> label_of_one(torch.tensor([[0.3], [-0.7], [0.4]]) * torch.tensor([0.5, -2.0]))
    1
    """
    require(
        weight.dim() == 2 and weight.dtype.is_floating_point,
        f"weight has shape {tuple(weight.shape)} and type {weight.dtype}: expected (c, k) of a float type",
    )
    rows = weight.double().nan_to_num(0.0)
    products = rows @ rows.T
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    # A product of 0 says nothing: no column is known in both rows.
    fits = ((products <= 0) | ~others).all(1) & ((products < 0) & others).any(1)
    found = fits.nonzero()[:, 0].tolist()
    return int(found[0]) if len(found) == 1 else None


def _require_layer(weight: Tensor, bias: Tensor) -> None:
    require(
        weight.dim() == 2 and bias.shape == weight.shape[:1],
        f"weight has shape {tuple(weight.shape)} and bias {tuple(bias.shape)}: expected (c, k) and (c,)",
    )
    require(
        weight.dtype.is_floating_point and bias.dtype.is_floating_point,
        f"weight is {weight.dtype} and bias {bias.dtype}: expected float types",
    )
