"""Which modules can be attributed, and how each turns inputs and output gradients into factors.

Model support is the table at the end of this file: Linear (LoRA's A and B are Linears), transformers' Conv1D,
Conv2d, Embedding, LayerNorm and RMSNorm scales, batch norm in eval mode. A parameter outside the table, or that its
module uses in a way that has no per-document gradient, is *reported* as uncovered, never skipped in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rootward.core.block import Factor, LookupFactor, MatrixFactor, VectorFactor
from rootward.core.errors import ArtefactError, InputError
from rootward.core.layout import ParamLayout

Factors = Iterator[tuple[str, Factor]]
Handler = Callable[[nn.Module, Tensor, Tensor], Factors]


def _per_document(x: Tensor, documents: int, positions: int) -> Tensor:
    """``[n, t * m, d]`` from ``[n, t, ..., d]``, heads in front ``[n, m, t, d]``, or flattened rows ``[n * t, d]``."""
    if x.shape[0] == documents:
        if x.dim() == 4 and x.shape[1] != positions and x.shape[2] == positions:
            x = x.transpose(1, 2)
        return x.reshape(documents, -1, x.shape[-1])
    if x.dim() == 2 and x.shape[0] == documents * positions:
        return x.view(documents, positions, -1)
    raise ArtefactError(
        f"expected a first dimension of {documents} documents (or {documents} x {positions} rows), "
        f"got shape {tuple(x.shape)}"
    )


def _summed(factor: VectorFactor, positions: int) -> VectorFactor:
    """One row per token: heads, or the places of an image, are added up."""
    n, rows, width = factor.rows.shape
    if rows == positions or rows % positions:
        return factor
    return VectorFactor(factor.rows.reshape(n, positions, rows // positions, width).sum(2))


def _linear(module: nn.Module, x: Tensor, g: Tensor) -> Factors:
    yield "weight", MatrixFactor(g, x)
    if getattr(module, "bias", None) is not None:
        yield "bias", VectorFactor(g)


def _conv1d(module: nn.Module, x: Tensor, g: Tensor) -> Factors:
    yield "weight", MatrixFactor(x, g, transposed=True)
    yield "bias", VectorFactor(g)


def _embedding(module: nn.Module, x: Tensor, g: Tensor) -> Factors:
    assert isinstance(module, nn.Embedding)
    ids = x.long().squeeze(-1)
    if module.padding_idx is not None:
        # torch gives the padding row no gradient, so neither do we
        g = g * (ids != module.padding_idx).unsqueeze(-1).to(g.dtype)
    yield "weight", LookupFactor(ids, g, module.num_embeddings)


def _layer_norm(module: nn.Module, x: Tensor, g: Tensor) -> Factors:
    assert isinstance(module, nn.LayerNorm)
    yield "weight", VectorFactor(g * F.layer_norm(x, module.normalized_shape, None, None, module.eps))
    if module.bias is not None:
        yield "bias", VectorFactor(g)


def _rms_norm(module: nn.Module, x: Tensor, g: Tensor) -> Factors:
    yield "weight", VectorFactor(g * _rms_unit(module, x, x.dtype).to(g.dtype))


def _rms_norm_single(module: nn.Module, x: Tensor, g: Tensor) -> Factors:
    # Llama's norm works in float32 whatever the model's dtype; so does its true gradient
    yield "weight", VectorFactor(g * _rms_unit(module, x, torch.float32).to(g.dtype))


def _rms_unit(module: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    wide = x.to(dtype) if dtype == torch.float64 else x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _conv2d(module: nn.Module, x: Tensor, g: Tensor) -> Factors:
    assert isinstance(module, nn.Conv2d)
    padding = module.padding
    if isinstance(padding, str):
        spans = [
            d * (k - 1) if padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ]
        x = F.pad(x, (spans[1] // 2, spans[1] - spans[1] // 2, spans[0] // 2, spans[0] - spans[0] // 2))
        padding = (0, 0)
    patches = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # type: ignore[arg-type]
    yield "weight", MatrixFactor(g, patches.transpose(1, 2))
    if module.bias is not None:
        yield "bias", VectorFactor(g)


def _batch_norm(module: nn.Module, x: Tensor, g: Tensor) -> Factors:
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    assert module.running_mean is not None and module.running_var is not None
    unit = (x - module.running_mean) * torch.rsqrt(module.running_var + module.eps)
    yield "weight", VectorFactor(g * unit)
    yield "bias", VectorFactor(g)


def _rms_handler(module: nn.Module) -> Handler | None:
    """For an RMS norm by name that really is one: linear in its scale, times the unit vector (Gemma's 1 + w passes)."""
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter):
        return None
    if set(dict(module.named_parameters())) != {"weight"} or weight.dim() != 1 or weight.is_meta:
        return None
    weight = weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.numel(), generator=generator, dtype=torch.float32).to(weight)
    step = torch.randn(weight.numel(), generator=generator, dtype=torch.float32).to(weight)
    try:
        with torch.no_grad():
            before = torch.func.functional_call(module, {"weight": torch.zeros_like(weight)}, (x,))
            raised = torch.func.functional_call(module, {"weight": step}, (x,)) - before
    except (TypeError, RuntimeError):  # it takes more than one input, or another width: not the norm that we know
        return None
    loose = {torch.float64: 1e-12, torch.float32: 1e-4}.get(weight.dtype, 2e-2)
    if torch.allclose(raised, (step * _rms_unit(module, x, x.dtype)).to(raised.dtype), atol=4 * loose, rtol=loose):
        return _rms_norm
    single = (step * _rms_unit(module, x, torch.float32)).to(raised.dtype)
    return _rms_norm_single if torch.allclose(raised, single, atol=1e-5, rtol=1e-5) else None


def _runs(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether the module is of this kind and computes as it does: a subclass may scale its result (as Gemma's does)."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _handler(module: nn.Module) -> Handler | None:
    """The table of supported modules."""
    if _runs(module, nn.Linear):
        return _linear
    if _runs(module, Conv1D):
        return _conv1d
    if isinstance(module, nn.Embedding) and _runs(module, nn.Embedding):
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return _embedding if plain else None
    if isinstance(module, nn.Conv2d) and _runs(module, nn.Conv2d):
        return _conv2d if module.groups == 1 and module.padding_mode == "zeros" else None
    if isinstance(module, nn.LayerNorm) and _runs(module, nn.LayerNorm):
        return _layer_norm if len(module.normalized_shape) == 1 and module.elementwise_affine else None
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        plain = _runs(module, nn.BatchNorm1d) or _runs(module, nn.BatchNorm2d)
        return _batch_norm if plain and module.affine and module.track_running_stats else None
    return _rms_handler(module)


@dataclass(frozen=True)
class Site:
    """One module whose parameters are attributed; ``params`` maps its own names to the model's canonical ones."""

    name: str
    module: nn.Module
    params: dict[str, str]
    handler: Handler

    def keep(self, inputs: Tensor, documents: int, positions: int) -> Tensor:
        """What the backward pass will need of the input: ``[n, t, i]`` (ids ``[n, t, 1]``, images ``[n, c, h, w]``)."""
        x = inputs.detach()
        if isinstance(self.module, nn.Embedding):
            x = x.expand(documents, *x.shape[1:]) if x.shape[0] == 1 else x
            return _per_document(x.unsqueeze(-1), documents, positions)
        if isinstance(self.module, nn.Conv2d):
            if x.dim() != 4 or x.shape[0] != documents:
                raise ArtefactError(f"expected images [{documents}, c, h, w], got shape {tuple(x.shape)}")
            return x  # unfolded in the backward pass, so that the copies of one module at a time are alive
        return _per_document(self._channels_last(x), documents, positions)

    def factors(self, kept: Tensor, gradient: Tensor, positions: int) -> Factors:
        """Factors of the wanted parameters from the output gradient ``[n, ..., o]`` (convolutions: channels first)."""
        g = _per_document(self._channels_last(gradient.detach()), kept.shape[0], positions)
        for own, factor in self.handler(self.module, kept, g):
            if own in self.params:
                yield self.params[own], _summed(factor, positions) if isinstance(factor, VectorFactor) else factor

    def narrowed(self, wanted: Callable[[str], bool]) -> Site | None:
        """This site with the wanted parameters only; None if it has none of them."""
        params = {own: name for own, name in self.params.items() if wanted(name)}
        return Site(self.name, self.module, params, self.handler) if params else None

    def _channels_last(self, x: Tensor) -> Tensor:
        """Convolutions and batch norms have their channels in the second place."""
        first = isinstance(self.module, nn.Conv2d | nn.BatchNorm1d | nn.BatchNorm2d) and x.dim() > 2
        return x.flatten(2).transpose(1, 2) if first else x


@dataclass(frozen=True)
class Tracked:
    """The parameters a pass attributes, where they are used, and what of the model is left out."""

    layout: ParamLayout
    sites: tuple[Site, ...]
    uncovered: dict[str, int]
    total: int

    @property
    def covered(self) -> int:
        """Number of parameter entries that are attributed."""
        return self.layout.size

    def only(self, wanted: Callable[[str], bool]) -> Tracked:
        """The sites that use a wanted parameter; the rest is not hooked."""
        sites = [kept for site in self.sites if (kept := site.narrowed(wanted))]
        names = tuple(n for n in self.layout.names if wanted(n))
        return Tracked(
            ParamLayout(names, tuple(self.layout.shape(n) for n in names)),
            tuple(sites),
            self.uncovered,
            self.total,
        )


def _default(name: str, matrix: bool, special: set[str], adapter: bool) -> bool:
    if adapter:
        return "lora_" in name or "modules_to_save" in name
    return matrix and name not in special


def track(model: nn.Module, parameters: str | None = None) -> Tracked:
    """Find the parameters to attribute.

    Args:
        model: any module; parameters shared by several modules count once, under their first name.
        parameters: regular expression over parameter names (``".*"`` for all that is supported). None takes what is
            usual: LoRA matrices of an adapter, else the weight matrices of all linear and convolutional modules
            except token embeddings and the output head.

    Raises:
        InputError: the expression is not one, or no supported parameter matches; the message names what there is.
    """
    try:
        pattern = re.compile(parameters) if parameters is not None else None
    except re.error as error:
        raise InputError(f"parameters: expected a regular expression, got {parameters!r} ({error})") from error
    canonical = {id(p): name for name, p in model.named_parameters()}
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    adapter = any("lora_" in name for name in sizes)
    special = _embedding_names(model, canonical)
    sites: list[Site] = []
    supported: set[str] = set()
    used_elsewhere: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=True):
        named = module.named_parameters(recurse=False, remove_duplicate=False)
        own = {k: canonical[id(p)] for k, p in named if id(p) in canonical}
        handler = _handler(module) if own else None
        if handler is None:
            used_elsewhere |= set(own.values())
            continue
        matrices = isinstance(module, nn.Linear | Conv1D | nn.Conv2d)
        # what the module has beside the parameters that its kind is known for (a subclass may add some)
        known = {k: full for k, full in own.items() if k in ("weight", "bias")}
        used_elsewhere |= set(own.values()) - set(known.values())
        supported |= set(known.values())
        chosen = {
            k: full
            for k, full in known.items()
            if (pattern.search(full) if pattern else _default(full, matrices and k == "weight", special, adapter))
        }
        if chosen:
            sites.append(Site(name, module, chosen, handler))
    # a tied parameter that one of its users applies in an unsupported way has no complete gradient
    sites = [kept for site in sites if (kept := site.narrowed(lambda name: name not in used_elsewhere))]
    supported -= used_elsewhere
    covered = {full for site in sites for full in site.params.values()}
    if not covered:
        raise InputError(_nothing(model, parameters, supported, sizes))
    names = tuple(name for name in sizes if name in covered)
    uncovered = {name: size for name, size in sizes.items() if name not in covered}
    return Tracked(ParamLayout(names, tuple(shapes[n] for n in names)), tuple(sites), uncovered, sum(sizes.values()))


def _embedding_names(model: nn.Module, canonical: dict[int, str]) -> set[str]:
    """Canonical names of token-embedding tables and of the language-model head."""
    found = {canonical[id(m.weight)] for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None and id(getattr(head, "weight", None)) in canonical:
        found.add(canonical[id(head.weight)])
    return found


def _nothing(model: nn.Module, parameters: str | None, supported: set[str], sizes: dict[str, int]) -> str:
    kinds = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))})
    if not supported:
        return (
            f"no covered module: expected Linear, Conv1D, Conv2d, Embedding, LayerNorm, RMSNorm or LoRA in the model, "
            f"got {', '.join(kinds) or 'no parameters'}"
        )
    shown = ", ".join(sorted(supported)[:6])
    return (
        f"parameters: expected an expression matching some of {len(supported)} supported of {len(sizes)} parameters "
        f"({shown}, ...), got {parameters!r}"
    )
