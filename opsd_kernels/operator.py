"""Makes a torch operator with a derivative of a fused function.

A fused function `run` maps (tensors, row_weight [N], options, whether to compute gradients) to

    loss [N] = row_weight_n * value_n, statistics, dh, dW, dbias   (None where not wanted)

where the gradients are those of sum_n loss_n, in `gemm.gradient_dtype`: for fp16 only backward
rounds them, after a loss scale has been applied. So forward already computes the gradients, and
backward only scales them: by one scalar for the sum, row by row (dh) for per-token losses. Only if
gradients are sums over rows (dW, dbias) whose shares are not known before backward, backward runs
`run` again.

An operator's schema allows only tensors and scalars. So descriptions are passed as their fields, in
a NamedTuple with the fields drop_zeros (whether tokens of weight 0 are left out), want_hidden,
want_weight, want_bias and others. Gradients that are not wanted are returned as empty tensors.
"""

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from opsd_kernels import gemm
from opsd_kernels.resolve import scaler
from opsd_kernels.sweep import Want

_SCHEMA_TYPES: dict[object, str] = {
    bool: "bool",
    float: "float",
    str: "str",
    float | None: "float?",
    int | None: "SymInt?",
    str | None: "str?",
}


class FusedOperator:
    """Registers `opsd::<name>` and `opsd::<name>_backward` with torch and calls them."""

    def __init__(
        self,
        name: str,
        run: Callable[..., tuple[Tensor | None, ...]],
        *,
        tensors: Sequence[str],
        by_token: tuple[str, ...],
        trainable: tuple[str, str, str],
        options: type,
        statistics: int,
    ) -> None:
        """tensors: their names in the schema; those with a "?" may be None. by_token: those with
        one row for each token. trainable: the hidden states [N, D], the head [V, D] and its bias
        [V], which get gradients. statistics: the number of rows of the statistics [statistics, N].
        """
        self.run, self.options, self.statistics = run, options, statistics
        names = [t.rstrip("?") for t in tensors]
        self.count, self.places = len(names), [names.index(t) for t in trainable]
        self.by_token = [names.index(t) for t in by_token]
        declared = [
            f"Tensor{'?' * t.endswith('?')} {t.rstrip('?')}" for t in (*tensors, "row_weight")
        ]
        fields = [f"{_schema_type(t)} {n}" for n, t in options.__annotations__.items()]
        self.forward = torch.library.custom_op(
            f"opsd::{name}",
            self._forward,
            mutates_args=(),
            schema=f"({', '.join([*declared, 'bool per_token', *fields])}) "
            "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        )
        self.recompute = torch.library.custom_op(
            f"opsd::{name}_backward",
            self._recompute,
            mutates_args=(),
            schema=f"({', '.join([*declared, *fields])}) -> (Tensor, Tensor, Tensor)",
        )
        self.forward.register_fake(self._fake_forward)
        self.recompute.register_fake(self._fake_recompute)
        self.forward.register_autograd(self._backward, setup_context=self._setup_context)

    def __call__(
        self,
        tensors: Sequence[Tensor | None],
        row_weight: Tensor,
        per_token: bool,
        options: tuple[Any, ...],
        token_loss: Callable[..., Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(loss [N] if `per_token` else its sum, differentiable; statistics [statistics, N]).

        token_loss: a function that is passed to `run`. A schema cannot have one: with it, the
        operator is not registered with torch, and torch.compile breaks its graph here.
        """
        arguments = (*tensors, row_weight, per_token, *options)
        if token_loss is None:
            loss, statistics, *_ = self.forward(*arguments)
        else:
            loss, statistics, *_ = _Unregistered.apply(self, token_loss, *arguments)
        return loss, statistics.detach()

    def _split(self, arguments):
        """(tensors, row_weight, the other arguments)."""
        return arguments[: self.count], arguments[self.count], arguments[self.count + 1 :]

    def _call(self, tensors, row_weight, options, gradients: bool, **more):
        run = self._without_zeros if options.drop_zeros else self.run
        with torch.amp.autocast(row_weight.device.type, enabled=False):
            loss, statistics, *found = run(tensors, row_weight, options, gradients, **more)
        return loss, statistics, *(row_weight.new_empty(0) if g is None else g for g in found)

    def _without_zeros(self, tensors, row_weight, options, gradients: bool, **more):
        """Call `run` without the tokens of weight 0, which then get 0 in all results.

        This is the only synchronisation of a call. Tokens are dropped, not multiplied by zero: NaN
        * 0 is NaN, and the products would be wasted.
        """
        n_tokens, keep = row_weight.shape[0], row_weight.nonzero().squeeze(-1)
        if keep.shape[0] == n_tokens:
            return self.run(tensors, row_weight, options, gradients, **more)
        if (token_loss := more.get("token_loss")) is not None:  # it gets indices among all tokens
            more = {"token_loss": lambda log_prob, rows: token_loss(log_prob, keep[rows])}
        kept = [
            x[keep] if k in self.by_token and x is not None else x for k, x in enumerate(tensors)
        ]
        loss, stats, d_hidden, *others = self.run(
            kept, row_weight[keep], options, gradients, **more
        )
        loss = loss.new_zeros(n_tokens).index_copy_(0, keep, loss)
        stats = stats.new_zeros((stats.shape[0], n_tokens)).index_copy_(1, keep, stats)
        if d_hidden is not None:
            everything = d_hidden.new_zeros((n_tokens, d_hidden.shape[1]))
            d_hidden = everything.index_copy_(0, keep, d_hidden)
        return loss, stats, d_hidden, *others

    def _forward(self, *arguments, **more):
        tensors, row_weight, (per_token, *fields) = self._split(arguments)
        options = self.options(*fields)
        now = _in_forward(per_token, options)
        loss, *rest = self._call(tensors, row_weight, options, now, **more)
        return loss if per_token else loss.sum(), *rest

    def _recompute(self, *arguments):
        tensors, row_weight, fields = self._split(arguments)
        _, _, *gradients = self._call(tensors, row_weight, self.options(*fields), True)
        dtype = tensors[0].dtype
        return tuple(x.to(dtype) if x.numel() else x for x in gradients)

    def _empty_gradients(self, tensors, row_weight, want: Want | None, dtype: torch.dtype):
        hidden, weight, _ = (tensors[k] for k in self.places)
        nothing = row_weight.new_empty(0)
        return (
            torch.empty_like(hidden, dtype=dtype) if want and want.hidden else nothing,
            torch.empty_like(weight, dtype=dtype) if want and want.weight else nothing.clone(),
            weight.new_empty(weight.shape[0], dtype=dtype)
            if want and want.bias
            else nothing.clone(),
        )

    def _fake_forward(self, *arguments):
        tensors, row_weight, (per_token, *fields) = self._split(arguments)
        options, n_tokens = self.options(*fields), tensors[0].shape[0]
        dtype = gemm.tile_dtype(tensors[0].dtype)
        now = wanted(options) if _in_forward(per_token, options) else None
        return (
            row_weight.new_empty((n_tokens,) if per_token else (), dtype=dtype),
            row_weight.new_empty((self.statistics, n_tokens), dtype=dtype),
            *self._empty_gradients(tensors, row_weight, now, gemm.gradient_dtype(tensors[0].dtype)),
        )

    def _fake_recompute(self, *arguments):
        tensors, row_weight, fields = self._split(arguments)
        want = wanted(self.options(*fields))
        return self._empty_gradients(tensors, row_weight, want, tensors[0].dtype)

    def _setup_context(self, ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        tensors, row_weight, (ctx.per_token, *fields) = self._split(inputs)
        ctx.arguments, ctx.options = len(inputs), self.options(*fields)
        ctx.computed, ctx.dtype = _in_forward(ctx.per_token, ctx.options), tensors[0].dtype
        ctx.save_for_backward(*(output[2:] if ctx.computed else (*tensors, row_weight)))

    def _backward(self, ctx, grad, *_):
        returned: list[Tensor | None] = [None] * ctx.arguments
        if grad is None:
            return tuple(returned)
        _refuse_double_backward(grad)
        want = wanted(ctx.options)
        if ctx.computed:
            by = grad[:, None] if ctx.per_token else grad
            gradients = _scaled(ctx.saved_tensors, by, ctx.dtype)
        else:
            *tensors, row_weight = ctx.saved_tensors
            gradients = self.recompute(*tensors, row_weight * grad, *ctx.options)
        for place, gradient, is_wanted in zip(
            self.places, gradients, (want.hidden, want.weight, want.bias), strict=True
        ):
            if is_wanted:
                returned[place] = gradient
        return tuple(returned)


class _Unregistered(torch.autograd.Function):
    """A `FusedOperator` call with a function among its arguments."""

    @staticmethod
    def forward(ctx, operator, token_loss, *arguments):
        if isinstance(arguments[0], FakeTensor):  # only the results' shapes are asked for
            output = operator._fake_forward(*arguments)
        else:
            output = operator._forward(*arguments, token_loss=token_loss)
        operator._setup_context(ctx, arguments, output)
        ctx.operator = operator
        return output

    @staticmethod
    def backward(ctx, *grads):
        return None, None, *ctx.operator._backward(ctx, *grads)


def wanted(options) -> Want:
    """The gradients that an operator's options ask for."""
    return Want(options.want_hidden, options.want_weight, options.want_bias)


def _in_forward(per_token: bool, options) -> bool:
    """Whether forward computes the gradients. It cannot if a row's share of the loss is unknown and
    gradients are sums over rows.
    """
    want = wanted(options)
    return want.any and not (per_token and want.head)


def _schema_type(annotation: type | types.UnionType) -> str:
    return _SCHEMA_TYPES[annotation]


def _scaled(saved: Sequence[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Multiply each of `saved` by `grad`, in `dtype`; empty tensors stand for gradients not wanted.

    In place if the graph is not used again: a copy of a [V, D] gradient would double the call's
    memory. (With retain_graph=True a second backward needs the original values.)
    """
    once = type(grad) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    scale_ = scaler(grad.device) if once and grad.numel() == 1 else None
    if once and grad.device.type == "cpu" and grad.numel() == 1 and grad.item() == 1.0:
        scaled = list(saved)
    elif scale_ is not None and grad.dtype == torch.float32 and _contiguous(saved):
        for x in saved:
            scale_(x, grad)
        scaled = list(saved)
    elif once:
        scaled = [x if x.numel() == 0 else x.mul_(grad) for x in saved]
    else:
        scaled = [x if x.numel() == 0 else x * grad for x in saved]
    return [x.to(dtype) for x in scaled]


def _contiguous(tensors: Sequence[Tensor]) -> bool:
    return all(x.is_contiguous() for x in tensors)


def _refuse_double_backward(grad: Tensor) -> None:
    """Raise RuntimeError for create_graph=True: the second derivative would silently be 0."""
    if type(grad) is Tensor and torch.is_grad_enabled():
        raise RuntimeError(
            "opsd_kernels: create_graph=True is not supported: no second derivatives"
        )
