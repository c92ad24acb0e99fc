"""A Hugging Face causal LM whose rows can each speak with their own mixture of experts.

`SpectralModel` owns nothing but the attachment: the weights stay the base's, every Hugging Face call keeps working, and
`detach` gives the same module types and storages back. A mixture belongs to a call and to the thread that makes it.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.chat_template_utils import get_json_schema
from transformers.utils.hub import cached_file

from svdexpert.basis import Basis, Rank, Support, decoder_layers, decompose, fingerprint, weight_of
from svdexpert.decision import Asked, Context, Decision, Dispatcher, weights_of_rows
from svdexpert.errors import (
    BasisError,
    DispatchError,
    MixtureError,
    SvdExpertError,
    TooLongError,
    UnknownExpertError,
    did_you_mean,
)
from svdexpert.expert import Core, Expert, flat_scale
from svdexpert.layers import (
    NOT_YET,
    Active,
    Form,
    Pending,
    Scope,
    adapt,
    decide_now,
    device_of,
    find_active,
    forget_reply,
    is_adapted,
    keep_state,
    note_reply,
    restore,
)
from svdexpert.mixture import Bank, Blend, Mixture, weights_of
from svdexpert.prefill import again
from svdexpert.template import render

Experts = Mixture | Blend | Sequence[Blend] | Tensor
"""A mixture, or what `SpectralModel.mixture` makes one of."""


logger = logging.getLogger("svdexpert.dispatch")
"""Decisions, as JSON, at the level DEBUG."""


class InForce(Enum):
    """The default of `experts`: the mixture of the enclosing `using`, else the base."""

    MIXTURE = "the mixture in force"


Message = Mapping[str, Any]
Prompts = str | Sequence[str] | Sequence[Message] | Sequence[Sequence[Message]] | Tensor
"""A text, a chat, several of either, or token ids (b t)."""


class SpectralModel:
    """A causal LM with a basis attached, so that experts can act on it.

    The base is frozen while attached: only offsets train. Use it as a context manager to detach at the end.

    Attributes:
        hf: the Hugging Face model; call it as ever, inside `using` with a mixture, outside as the plain base.
        basis: U_k, s_k, V_k of its matrices.
        tokenizer: its tokenizer, or None if it was attached without one.
        form: "delta" or "factored".
    """

    def __init__(
        self, hf: PreTrainedModel, basis: Basis, tokenizer: PreTrainedTokenizerBase | None, form: Form
    ) -> None:
        self.hf = hf
        self.basis = basis
        self.tokenizer = tokenizer
        self.form = form
        self._scope = Scope()
        self._attached = True
        self._banks: OrderedDict[tuple[tuple[str, int], ...], tuple[Bank, tuple[Expert, ...]]] = OrderedDict()
        self._scales: dict[Core, Tensor] = {}
        self._modules = [hf.get_submodule(name) for name in basis.names]
        self._dtypes = [cast(Tensor, module.weight).dtype for module in self._modules]
        self._needed_gradient = [(one, one.requires_grad) for one in hf.parameters()]
        self._checkpointing = [m for m in hf.modules() if isinstance(m, GradientCheckpointingLayer | PreTrainedModel)]
        if any(is_adapted(module) for module in self._modules):
            raise SvdExpertError("This model is attached already: detach() it first, or use the one that holds it.")
        self._hooks: list[RemovableHandle] = []
        self._hooked: list[nn.Module] = []
        try:
            for position, (module, factors) in enumerate(zip(self._modules, basis.factors.values(), strict=True)):
                adapt(module, factors, self._scope, position, form)
            hf.requires_grad_(False)
            head = hf.get_output_embeddings()
            self._hooked = [one for one in (hf, decoder_layers(hf)[1][-1], head) if one is not None]
            for one in self._hooked:  # not in the hooks, so that a copied model finds the scope of its own
                cast(Any, one)._svd_scope = self._scope
            if head is not None:
                self._hooks.append(head.register_forward_pre_hook(_laid_out))
            for one in self._hooked[1:]:
                self._hooks.append(one.register_forward_pre_hook(keep_state, with_kwargs=True))
            self._hooks.append(hf.register_forward_pre_hook(find_active, with_kwargs=True))
            self._hooks.append(hf.register_forward_hook(note_reply, with_kwargs=True))
            self._hooks.append(hf.register_forward_hook(decide_now, with_kwargs=True))
            self._capture_checkpoints()
        except BaseException:
            self.detach()
            raise

    # --- made and unmade

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        *,
        revision: str | None = None,
        k: Rank = 64,
        support: Support = "top",
        first_layer: int | None = None,
        targets: Sequence[str] | None = None,
        calibration: Sequence[str] | None = None,
        form: Form = "delta",
        dtype: str | torch.dtype = "auto",
        device_map: str | dict[str, Any] | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        cache: bool = True,
        progress: bool = True,
    ) -> SpectralModel:
        """Load a model and its tokenizer, decompose it (once; then from the cache) and attach the basis.

        Args:
            base: hub id or local folder of a causal LM; "harbor" is the embedded base.
            revision: branch, tag or commit of a hub id.
            k: directions kept in every matrix, or "full".
            support: "top" or "sensitivity".
            first_layer: first decoder layer that experts touch; a third of the depth if None.
            targets: shell-style patterns of module names that narrow what is adapted.
            calibration: texts, one batch each, for support "sensitivity".
            form: "delta"; "factored" needs k="full" and does not read W while a mixture is active.
            dtype: of the loaded weights; "auto" is the checkpoint's own, and fp32 for harbor, which is small: CPUs
                without bf16 compute in it very slowly.
            device_map: as in transformers.
            token: for private repositories.
            trust_remote_code: run modelling code from the repository.
            cache: keep factors on disk.
            progress: show a progress bar on stderr.

        Raises:
            BasisError: the model cannot be loaded, or not be decomposed as asked.
        """
        name, base = str(base), check_base(base)
        if name == "harbor" and dtype == "auto":
            dtype = torch.float32
        where = {"revision": revision, "token": token, "trust_remote_code": trust_remote_code}
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base, dtype=dtype, device_map=device_map, output_loading_info=True, **where
            )
        except (OSError, ValueError, AttributeError, AssertionError, ImportError, RuntimeError) as error:
            raise BasisError(f"{base} cannot be loaded as a causal language model. {error}") from error
        hf, loading = loaded
        hf.config._name_or_path = name  # "harbor" stays "harbor" in the files of its experts, wherever it is installed
        try:
            tokenizer = AutoTokenizer.from_pretrained(base, **where)
        except (OSError, ValueError):  # a model without tokenizer files still takes token ids
            tokenizer = None
        checkpoint = None
        if not loading["missing_keys"]:  # weights that the files lack are random: nothing recorded speaks for them
            config = cached_file(base, "config.json", revision=revision, token=token)
            checkpoint = Path(config).parent if config else None
        batches = None
        if calibration is not None:
            if tokenizer is None:
                raise BasisError(f"{base} has no tokenizer: call decompose() with calibration token ids instead.")
            batches = [tokenizer(text, return_tensors="pt")["input_ids"] for text in calibration]
        basis = decompose(
            hf,
            targets,
            k,
            support,
            first_layer,
            calibration=batches,
            checkpoint=checkpoint,
            cache=cache,
            progress=progress,
        )
        return cls._on(hf, basis, tokenizer, form)

    @classmethod
    def attach(
        cls,
        hf: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        basis: Basis | None = None,
        k: Rank = 64,
        support: Support = "top",
        first_layer: int | None = None,
        targets: Sequence[str] | None = None,
        form: Form = "delta",
        progress: bool = True,
    ) -> SpectralModel:
        """Let experts act on a model that is already loaded.

        Args:
            hf: any Hugging Face causal LM.
            tokenizer: for text prompts; without one, pass token ids.
            basis: of exactly these weights; decomposed here if None, with the arguments that follow.
            k: directions kept in every matrix, or "full".
            support: "top"; for "sensitivity" call `decompose` and pass its basis.
            first_layer: first decoder layer that experts touch; a third of the depth if None.
            targets: shell-style patterns of module names that narrow what is adapted.
            form: "delta", or "factored" for k="full".
            progress: show a progress bar on stderr.

        Raises:
            BasisError: the model cannot be decomposed as asked, or `basis` is that of other weights.
            SvdExpertError: the model is attached already.
        """
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise SvdExpertError(f"tokenizer is a {type(tokenizer).__name__}; a basis goes in basis=...")
        if basis is None:
            basis = decompose(hf, targets, k, support, first_layer, progress=progress)
        else:
            modules = dict(hf.named_modules())
            for name, one in basis.key.matrices.items():
                if name not in modules:
                    raise BasisError(f"The basis has {name}, this model does not: it is the basis of another model.")
                with weight_of(modules[name]) as weight:
                    if tuple(weight.shape) != one.shape or fingerprint(weight) != one.fingerprint:
                        raise BasisError(f"The basis is that of other weights (first difference: {name}).")
        return cls._on(hf, basis, tokenizer, form)

    @classmethod
    def _on(
        cls, hf: PreTrainedModel, basis: Basis, tokenizer: PreTrainedTokenizerBase | None, form: Form
    ) -> SpectralModel:
        if form not in ("delta", "factored"):
            raise BasisError(f"form is {form!r}." + did_you_mean(str(form), ("delta", "factored")))
        short = [name for name, one in basis.key.matrices.items() if one.k < min(one.shape)]
        if form == "factored" and short:
            raise BasisError(f'The factored form needs all directions; {short[0]} keeps fewer. Use k="full".')
        return cls(hf, basis, tokenizer, form)

    def detach(self) -> PreTrainedModel:
        """Give the untouched base back: same storages, same module types, gradients required as before.

        Returns:
            The Hugging Face model. This object can no longer be used.
        """
        if not self._attached:
            return self.hf
        for module in self._modules:
            restore(module)
        for hook in self._hooks:
            hook.remove()
        for one in self._hooked:
            one.__dict__.pop("_svd_scope", None)
        for parameter, needed in self._needed_gradient:
            parameter.requires_grad_(needed)
        for module in self._checkpointing:
            captured = module.__dict__.get("_gradient_checkpointing_func")
            if isinstance(captured, _CapturedCheckpoint):
                cast(Any, module)._gradient_checkpointing_func = captured.original
        self._attached = False
        return self.hf

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # --- mixtures

    def bank(self, experts: Mapping[str, Expert]) -> Bank:
        """Return experts stacked on this model's device, checked to fit it; the fast way to mix many times.

        Args:
            experts: by name; a `Library` is one.

        Raises:
            MismatchError: one of them does not fit this model.
        """
        bank = Bank.of(experts, self.basis)
        return replace(bank, offsets=bank.offsets.to(self._places[0][0]))

    def mixture(
        self,
        experts: Experts,
        library: Mapping[str, Expert] | Bank | None = None,
    ) -> Mixture | None:
        """Return what `experts` means on this model; None is the base.

        Args:
            experts: one mixture for all rows (an expert, a name, weights by name, None), a sequence of them with one
                a row, a tensor of weights over the library (e), (b e) or (b t e), or a `Mixture`.
            library: where names are looked up.

        Raises:
            MixtureError: an unknown name, names without a library, weights that are not finite.
            MismatchError: an expert, or the basis of a bank or mixture, does not fit this model.
        """
        if experts is None or (isinstance(experts, Mapping) and not experts):
            return None
        if isinstance(experts, Mixture):
            wanted = sum(self._sizes(experts.core))
            if experts.offsets.dim() not in (1, 2, 3) or experts.offsets.shape[-1] != wanted:
                raise MixtureError(
                    f"The mixture has shape {tuple(experts.offsets.shape)}; on this basis it is (n), (b n) or (b t n) "
                    f"with n = {wanted}."
                )
            self._check_basis(experts.basis)
            return experts
        if isinstance(experts, Expert):
            experts.check_on(self.basis)
            flat = experts.flat(self.basis)
            return Mixture(flat, experts.core, invocation=experts.invocation, reach=experts.reach)
        if isinstance(experts, Tensor):
            if library is None:
                raise MixtureError("Weights in a tensor need library=..., whose order they follow.")
            return self._bank(library, None).mix(experts)
        if isinstance(experts, str | Mapping):
            return self._bank(library, [experts]).mix(weights_of(experts))
        if not isinstance(experts, Sequence):
            raise MixtureError(f"experts is a {type(experts).__name__}: {_KINDS}.")
        if any(isinstance(row, Expert) for row in experts):
            return self._rows(experts, library)
        if all(not weights_of(row) for row in experts):
            return None  # every row is the base
        return self._bank(library, experts).mix(experts)

    def _rows(self, experts: Sequence[Blend], library: Mapping[str, Expert] | Bank | None) -> Mixture:
        """Stack rows some of which are expert values."""
        values = [row for row in experts if isinstance(row, Expert)]
        first, flat = values[0], []
        for row in experts:
            if isinstance(row, Expert):
                row.check_on(self.basis, like=first)
                flat.append(row.flat(self.basis))
            elif not weights_of(row):
                flat.append(torch.zeros(sum(self._sizes(first.core))))
            else:
                mixed = self._bank(library, [row]).mix(weights_of(row))
                for what in ("core", "invocation", "reach"):
                    if getattr(mixed, what) != getattr(first, what):
                        found = f"{getattr(mixed, what)} and {getattr(first, what)}"
                        raise MixtureError(f"Rows of one batch share core, invocation and reach; found {what} {found}.")
                flat.append(mixed.offsets.cpu())
        return Mixture(torch.stack(flat), first.core, invocation=first.invocation, reach=first.reach)

    def _bank(self, library: Mapping[str, Expert] | Bank | None, rows: Sequence[Blend] | None) -> Bank:
        """Return the bank of a library, or of those of its experts that the rows name; the last few are kept."""
        if isinstance(library, Bank):
            self._check_basis(library.basis)
            return library
        if library is None:
            raise MixtureError("Experts given by name need library=... (a Library, or experts by name).")
        names = list(library) if rows is None else list(dict.fromkeys(n for row in rows for n in weights_of(row)))
        try:
            experts = {name: library[name] for name in names}
        except UnknownExpertError:
            raise
        except KeyError as error:
            name = str(error.args[0])
            raise MixtureError(f"There is no expert {name!r}." + did_you_mean(name, library)) from None
        key = tuple((name, id(expert)) for name, expert in experts.items())
        held = self._banks.get(key)
        if held is None:  # threads may both make it; that is only work done twice
            held = self._banks[key] = (self.bank(experts), tuple(experts.values()))  # kept, so that ids stay theirs
            while len(self._banks) > 8:
                self._banks.popitem(last=False)
        return held[0]

    def _check_basis(self, basis: Basis | None) -> None:
        """Raise unless a bank or mixture was made for this model's basis; the experts in it are no longer at hand."""
        if basis is None or basis is self.basis:
            return
        Expert.zeros(basis).check_on(self.basis, who="the bank or mixture")

    @contextmanager
    def using(
        self,
        experts: Experts,
        library: Mapping[str, Expert] | Bank | None = None,
    ) -> Iterator[Self]:
        """Put a mixture in force for any call of `hf` in the body, in this thread; None is the base.

        Args:
            experts: as in `mixture`.
            library: where names are looked up.

        Raises:
            MixtureError: as in `mixture`; at the forward pass, when rows or tokens do not match the batch.
            MismatchError: an expert does not fit this model.
        """
        if not self._attached:
            raise SvdExpertError("This model is detached: attach it again with SpectralModel.attach(model.hf, ...).")
        mixture = self.mixture(experts, library)
        self._capture_checkpoints()
        self.check_cast()
        with self._scope.entered(*self._in_force(mixture)):
            yield self

    def _in_force(
        self, mixture: Mixture | None
    ) -> tuple[tuple[Tensor, ...] | None, bool, Mixture | None, Active | None]:
        """Return what a scope holds under a mixture."""
        if mixture is None:
            return None, False, None, None
        active = NOT_YET if mixture.invocation else None
        return self._coefficients(mixture), mixture.core == "dense", mixture, active

    def _coefficients(self, mixture: Mixture) -> tuple[Tensor, ...]:
        """Return what each matrix multiplies V^T x by: (k) | (b 1 k) | (b t k), dense (k k) | (b k k) | (b t k k)."""
        core = mixture.core
        offsets = mixture.offsets
        if core not in self._scales or self._scales[core].device != offsets.device:
            with torch.inference_mode(False):  # kept, so it may be needed by training later
                self._scales[core] = flat_scale(self.basis.singular_values, core).to(offsets.device)
        changes = offsets * self._scales[core]
        if core == "diag" and self.form == "factored":
            changes = changes + self._scales[core]  # s * (1 + d)
        sizes = self._sizes(core)
        if core == "diag" and changes.dim() == 2:
            changes = rearrange(changes, "b n -> b 1 n")
        by_place = {place: changes.to(place[0], place[1]).split(sizes, -1) for place in set(self._places)}
        parts = [by_place[place][position] for position, place in enumerate(self._places)]
        if core == "dense":
            ks = self.basis.sizes
            parts = [part.unflatten(-1, (k, k)) for part, k in zip(parts, ks, strict=True)]
            if self.form == "factored":
                values = self.basis.factors.values()
                parts = [part + one.s.to(part).diag() for part, one in zip(parts, values, strict=True)]
        return tuple(parts)

    def _sizes(self, core: Core) -> list[int]:
        return [k * k if core == "dense" else k for k in self.basis.sizes]

    @property
    def _places(self) -> list[tuple[torch.device, torch.dtype]]:
        factors = [cast(Tensor, module._buffers["_svd_u_t"]) for module in self._modules]
        return [(factor.device, factor.dtype) for factor in factors]

    def check_cast(self) -> None:
        """Raise if the weights were rounded after they were attached: experts are not made for those.

        Raises:
            BasisError: they were.
        """
        for module, before in zip(self._modules, self._dtypes, strict=True):
            now = cast(Tensor, module._buffers["_svd_v"]).dtype
            if now is not before and torch.promote_types(before, now) is not now:
                raise BasisError(
                    f"The base was cast from {before} to {now} after it was attached, so it has other weights than its "
                    "basis. Detach it, cast it, and attach it again."
                )

    def _capture_checkpoints(self) -> None:
        """Make gradient checkpointing recompute a layer under the mixture of its forward pass."""
        for module in self._checkpointing:
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and not isinstance(function, _CapturedCheckpoint):
                cast(Any, module)._gradient_checkpointing_func = _CapturedCheckpoint(function, self._scope)

    def recomputed(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Return an activation checkpointing function that computes again under the mixture of its forward pass.

        Args:
            checkpoint: called with a function and its arguments, as torch.utils.checkpoint.checkpoint is.
        """
        return _CapturedCheckpoint(checkpoint, self._scope)

    # --- calls

    def generate(
        self,
        prompts: Prompts,
        experts: Experts | InForce = InForce.MIXTURE,
        *,
        library: Mapping[str, Expert] | Bank | None = None,
        dispatcher: Dispatcher | None = None,
        on_decision: Callable[[Sequence[Decision]], object] | None = None,
        attention_mask: Tensor | None = None,
        tools: Sequence[Any] | None = None,
        max_new_tokens: int | None = None,
        streamer: BaseStreamer | None = None,
        **generation: Any,
    ) -> list[str] | Tensor:
        """Generate with a mixture of experts, another one in every row if wanted.

        Args:
            prompts: texts, chats (lists of messages, put through the chat template) or token ids (b t).
            experts: one mixture for all rows or one a row, as in `mixture`; None is the base. By default the mixture
                of the enclosing `using`, else the base.
            library: where names are looked up.
            dispatcher: decides on the mixture of every row, once, instead of `experts`; see `svdexpert.dispatch`.
            on_decision: called with its decisions, one a prompt.
            attention_mask: (b t), for token ids with padding (on the left).
            tools: functions or JSON schemas for the chat template. Chats are written as in training: templates that
                can think are told not to, and functions are spelled out where a template knows none.
            max_new_tokens: upper bound of the reply, in tokens; 64 if None and the settings have none.
            streamer: a transformers streamer (they take one row).
            generation: generation_config, any setting of it (do_sample, num_beams, stop_strings, ...), or
                stopping_criteria, logits_processor and the like.

        Returns:
            For texts and chats the replies, `num_return_sequences` a prompt; for token ids, or with
            `return_dict_in_generate`, what transformers returns.

        Raises:
            MixtureError: the rows of `experts` are not those of `prompts`, or it is by token; activated experts, and a
                prompt in which the chat template opens no reply.
            DispatchError: a dispatcher that cannot decide here: no library, experts that are missing, another base.
            TooLongError: a dispatcher, and a prompt that fills the model's context.
            SvdExpertError: text without a tokenizer, chats without a chat template.
        """
        if isinstance(prompts, Tensor):
            ids, mask = _rows(prompts), torch.ones_like(prompts) if attention_mask is None else attention_mask
        elif attention_mask is not None:
            raise SvdExpertError("attention_mask belongs to token ids; texts and chats are padded here.")
        else:
            ids, mask = self._padded(self._encode(prompts, tools), left=True)
        if dispatcher is not None and not isinstance(experts, InForce):
            raise MixtureError("Give experts or a dispatcher, which decides on them.")
        mixture = None if dispatcher is not None else self._for_rows(experts, library, ids.shape[0])
        if mixture is not None and mixture.offsets.dim() == 3:
            raise MixtureError("generate takes one mixture a row: tokens that do not exist yet have none of their own.")
        config = copy.deepcopy(generation.pop("generation_config", None) or self.hf.generation_config)
        rest = config.update(**generation)  # what is no setting: stopping_criteria, logits_processor, ...
        if max_new_tokens is not None:
            config.max_new_tokens = max_new_tokens
        elif config.max_new_tokens is None and config.max_length is None:
            config.max_new_tokens = 64
        if config.pad_token_id is None and self.tokenizer is not None:
            config.pad_token_id = self._pad_id()
        if config.stop_strings is not None:
            rest["tokenizer"] = self._tokenizer()
        defaults = self.hf.generation_config  # transformers fills in from it what the given settings leave open
        beams = config.num_beams or defaults.num_beams or 1
        times = max(beams, config.num_return_sequences or defaults.num_return_sequences or 1)
        pending, opens = None, () if mixture is None else mixture.invocation
        if dispatcher is not None:
            self._check_length(mask)
            asked = Asked(_contexts(prompts, tools), ids, mask)
            bank = self._bank_for(dispatcher, library)
            opens = bank.invocation
            if dispatcher.reads:
                _one_prefill(config, rest)
                pending = self._pending(dispatcher, asked, bank, times, on_decision)
            else:
                mixture = self._decided(dispatcher, asked, bank, on_decision)
        if mixture is not None and mixture.invocation and config.prefill_chunk_size:
            raise MixtureError("Activated experts need the whole prompt in one pass: leave prefill_chunk_size out.")
        if mixture is not None:
            mixture = mixture.repeated(times)
        if opens:
            forget_reply(rest.get("past_key_values"), ids, opens)
        device = device_of(self.hf.get_input_embeddings())
        with self.using(mixture):
            self._scope.pending = pending
            output = cast(Any, self.hf).generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                streamer=streamer,
                **rest,
            )
        if isinstance(prompts, Tensor) or not isinstance(output, Tensor):
            return cast(Tensor, output)
        replies = output[:, ids.shape[1] :]
        return [str(self._tokenizer().decode(row, skip_special_tokens=True)) for row in replies]

    def _bank_for(self, dispatcher: Dispatcher, library: Mapping[str, Expert] | Bank | None) -> Bank:
        """Return the bank that a dispatcher may choose from."""
        if isinstance(dispatcher, str | Path):
            raise DispatchError(f"dispatcher is {str(dispatcher)!r}: give what svdexpert.dispatch.open_file returns.")
        if library is None:
            raise DispatchError("A dispatcher needs library=...: the experts that it chooses from.")
        dispatcher.check(self, library)
        if isinstance(library, Mapping):  # a dispatcher that names nobody is asked too, beside whomever
            library = {name: library[name] for name in dispatcher.experts or tuple(library)[:1]}
        return self._bank(library, None)

    def _check_length(self, mask: Tensor) -> None:
        """Raise a TooLongError where a prompt leaves no room for a reply."""
        limit = getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)
        longest = int(mask.sum(-1).max())
        if isinstance(limit, int) and longest >= limit:
            raise TooLongError(f"The longest prompt has {longest} tokens, the model takes {limit} with the reply.")

    def _decided(
        self,
        dispatcher: Dispatcher,
        asked: Asked,
        bank: Bank,
        on_decision: Callable[[Sequence[Decision]], object] | None,
    ) -> Mixture | None:
        """Return the mixture of every row that a dispatcher decides on; None where no expert speaks in any."""
        decisions = dispatcher.decide(self, asked)
        if len(decisions) != len(asked.ids):
            raise DispatchError(f"The dispatcher took {len(decisions)} decisions for {len(asked.ids)} prompts.")
        weights = weights_of_rows(decisions, bank.names)
        for one in decisions:
            logger.debug("%s", json.dumps(one.as_json()))
        if on_decision is not None:
            on_decision(decisions)
        return bank.mix(weights) if bool(weights.any()) else None

    def _pending(
        self,
        dispatcher: Dispatcher,
        asked: Asked,
        bank: Bank,
        times: int,
        on_decision: Callable[[Sequence[Decision]], object] | None,
    ) -> Pending:
        """Return what decides at the end of the prompt's forward pass, where every row stands `times` times."""

        def pending(state: Tensor, kwargs: dict[str, Any], output: Any) -> Any:
            mixture = self._decided(dispatcher, replace(asked, state=state[::times]), bank, on_decision)
            if mixture is None:
                return output
            mixture = mixture.repeated(times)
            scope = self._scope
            scope.coefficients, scope.dense, scope.mixture, scope.active = self._in_force(mixture)
            return again(self.hf, mixture.invocation, mixture.offsets.ne(0).any(-1), kwargs, output)

        return pending

    def logits(
        self,
        prompts: Prompts,
        experts: Experts | InForce = InForce.MIXTURE,
        *,
        library: Mapping[str, Expert] | Bank | None = None,
        tools: Sequence[Any] | None = None,
    ) -> Tensor:
        """Return next-token logits (b t v); shorter prompts are padded on the right, where it changes nothing before.

        Args:
            prompts: texts, chats or token ids (b t).
            experts: as in `mixture`, by token too; by default as in `generate`.
            library: where names are looked up.
            tools: for the chat template.
        """
        if isinstance(prompts, Tensor):
            ids, mask = _rows(prompts), torch.ones_like(prompts)
        else:
            ids, mask = self._padded(self._encode(prompts, tools), left=False)
        return self._forward(ids, mask, self._for_rows(experts, library, ids.shape[0]))

    def logprobs(
        self,
        prompts: Prompts,
        completions: Sequence[str] | Sequence[Tensor],
        experts: Experts | InForce = InForce.MIXTURE,
        *,
        library: Mapping[str, Expert] | Bank | None = None,
        tools: Sequence[Any] | None = None,
    ) -> list[Tensor]:
        """Return the log-probability of every token of every completion, given its prompt.

        Args:
            prompts: texts, chats or token ids (b t) without padding.
            completions: one a prompt: text, tokenised without special tokens, or token ids (t).
            experts: one mixture for all rows or one a row; by default as in `generate`.
            library: where names are looked up.
            tools: for the chat template.

        Returns:
            One tensor (t) a row, fp32, in nats.
        """
        starts = list(_rows(prompts)) if isinstance(prompts, Tensor) else self._encode(prompts, tools)
        if len(completions) != len(starts):
            raise SvdExpertError(f"There are {len(starts)} prompts and {len(completions)} completions.")
        ends = [
            one if isinstance(one, Tensor) else self._token_ids(one, add_special_tokens=False) for one in completions
        ]
        ids, mask = self._padded(
            [torch.cat([start.cpu(), end.cpu()]) for start, end in zip(starts, ends, strict=True)], left=False
        )
        logits = self._forward(ids, mask, self._for_rows(experts, library, ids.shape[0]))
        result = []
        for row, (start, end) in enumerate(zip(starts, ends, strict=True)):
            scores = logits[row, len(start) - 1 : len(start) + len(end) - 1].float().log_softmax(-1)  # (t v)
            result.append(scores.gather(-1, end.to(scores.device)[:, None]).squeeze(-1))
        return result

    def _forward(self, ids: Tensor, mask: Tensor, mixture: Mixture | None) -> Tensor:
        device = device_of(self.hf.get_input_embeddings())
        with self.using(mixture):
            output = self.hf(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        return cast(Tensor, output.logits)

    def _for_rows(
        self, experts: Experts | InForce, library: Mapping[str, Expert] | Bank | None, rows: int
    ) -> Mixture | None:
        """Return the mixture of a call for a batch of so many rows."""
        if isinstance(experts, InForce):
            mixture: Mixture | None = self._scope.mixture
        else:
            mixture = self.mixture(experts, library)
            given = len(experts) if isinstance(experts, Sequence) and not isinstance(experts, str) else rows
            if given != rows:
                raise MixtureError(f"There are {rows} prompts and {given} rows of experts: give one for each row.")
        if mixture is not None and mixture.rows not in (None, rows):
            raise MixtureError(f"There are {rows} prompts and {mixture.rows} rows of experts: give one for each row.")
        return mixture

    # --- text

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise SvdExpertError("This model has no tokenizer: pass token ids, or attach it with tokenizer=...")
        return self.tokenizer

    def _encode(self, prompts: Prompts, tools: Sequence[Any] | None) -> list[Tensor]:
        """Return the token ids (t) of every prompt."""
        batch: Any = prompts
        if isinstance(batch, str) or (batch and isinstance(batch[0], Mapping)):
            batch = [batch]
        if not batch:
            raise SvdExpertError("There are no prompts.")
        if not isinstance(batch[0], str | Sequence) or (
            not isinstance(batch[0], str) and not all(isinstance(turn, Mapping) for turn in batch[0])
        ):
            raise SvdExpertError("Prompts are texts, chats (lists of messages), or a tensor of token ids (b t).")
        if isinstance(batch[0], str):
            if tools:
                raise SvdExpertError("tools belong to chats: pass lists of messages instead of texts.")
            return [self._token_ids(text) for text in batch]
        tokenizer = self._tokenizer()
        if tokenizer.chat_template is None:
            raise SvdExpertError("The tokenizer has no chat template: pass texts, or set tokenizer.chat_template.")
        return [torch.tensor(render(tokenizer, chat, _schemas(tools))) for chat in batch]

    def _token_ids(self, text: str, add_special_tokens: bool = True) -> Tensor:
        ids = self._tokenizer()(text, add_special_tokens=add_special_tokens)["input_ids"]
        if not ids:
            raise SvdExpertError("A text of no tokens cannot be scored or continued.")
        return torch.tensor(ids)

    def _pad_id(self) -> int:
        tokenizer = self._tokenizer()
        for one in (tokenizer.pad_token_id, tokenizer.eos_token_id):
            if isinstance(one, int):
                return one
        return 0  # masked wherever it stands

    def _padded(self, sequences: Sequence[Tensor], *, left: bool) -> tuple[Tensor, Tensor]:
        """Return ids and mask (b t)."""
        side = "left" if left else "right"
        pad = self._pad_id() if self.tokenizer is not None else 0
        ids = nn.utils.rnn.pad_sequence(list(sequences), True, float(pad), padding_side=side)
        ones = [torch.ones_like(one) for one in sequences]
        return ids, nn.utils.rnn.pad_sequence(ones, True, 0.0, padding_side=side)

    def __repr__(self) -> str:
        state = "attached" if self._attached else "detached"
        return f"SpectralModel({self.basis.key}, {state}, {self.form} form, {self.basis!r})"


def _laid_out(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    """Give the head its input in plain layout, where generation hands it a slice: the last token of every row.

    With a frozen weight, torch multiplies such a slice by a copy of the whole head (bmm instead of mm): three times the
    prefill of Qwen2.5-0.5B in bf16 on a CPU, and other roundings than the base has before it is frozen.
    """
    (x,) = inputs
    plain = all(stride == math.prod(x.shape[axis + 1 :]) for axis, stride in enumerate(x.stride()))
    return inputs if plain else (x.clone(memory_format=torch.contiguous_format),)


def _schemas(tools: Sequence[Any] | None) -> tuple[Any, ...]:
    """Return functions as JSON schemas."""
    return tuple(get_json_schema(one) if callable(one) else one for one in tools or ())


def _contexts(prompts: Prompts, tools: Sequence[Any] | None) -> list[Context] | None:
    """Return prompts as conversations; None where they are texts or token ids."""
    if isinstance(prompts, Tensor | str) or isinstance(prompts[0], str):
        return None
    chats = [prompts] if isinstance(prompts[0], Mapping) else prompts
    return [Context(tuple(cast(Any, chat)), _schemas(tools)) for chat in chats]


def _one_prefill(config: GenerationConfig, rest: Mapping[str, Any]) -> None:
    """Refuse ways of generating that do not read the prompt in one forward pass."""
    if config.prefill_chunk_size:
        raise DispatchError("This dispatcher reads the prompt in one forward pass: leave prefill_chunk_size out.")
    if rest.get("assistant_model") is not None or config.prompt_lookup_num_tokens:
        raise DispatchError(
            "This dispatcher decides at the end of the prompt's forward pass, and assisted decoding has none of its "
            "own: leave assistant_model and prompt_lookup_num_tokens out, or decide first and pass experts=..."
        )


def _rows(ids: Tensor) -> Tensor:
    if ids.dim() != 2 or ids.is_floating_point():
        raise SvdExpertError(f"Token ids are whole numbers (b t), not {tuple(ids.shape)} of {ids.dtype}.")
    return ids


_KINDS = "use an expert, a name, weights by name, None, a sequence of these, a tensor of weights, or a Mixture"


HARBOR = "harbor"


def check_base(base: str | Path) -> str:
    """Return where a base is: a hub id, which may turn out not to exist, or a folder; "harbor" is one of the package's.

    Raises:
        BasisError: not a name, a path where there is no folder, or "harbor" where it was not installed.
    """
    if not isinstance(base, str | Path):
        raise BasisError(
            f"A base is a hub id or a folder, not a {type(base).__name__}. For a model that is already loaded use "
            "SpectralModel.attach(model, tokenizer)."
        )
    if base == HARBOR:
        folder = Path(__file__).parent / HARBOR
        if not (folder / "config.json").is_file():
            raise BasisError(
                f"The embedded base {HARBOR!r} is not part of this version: {folder} holds no model. Give a hub id or "
                "the folder of a model of your own."
            )
        return str(folder)
    if (isinstance(base, Path) or base.startswith((".", "/", "~"))) and not Path(base).is_dir():
        raise BasisError(f"{base} is not a folder.")
    return str(base)


class _CapturedCheckpoint:
    """A gradient-checkpointing function that recomputes under the mixture of its forward pass.

    The backward pass may run after the scope has closed, under another mixture, and in another thread.
    """

    def __init__(self, original: Callable[..., Any], scope: Scope) -> None:
        self.original = original
        self.scope = scope

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        coefficients, dense, mixture = self.scope.coefficients, self.scope.dense, self.scope.mixture
        active = self.scope.active
        if mixture is not None and getattr(self.original, "keywords", {}).get("use_reentrant"):
            raise SvdExpertError(
                "Reentrant activation checkpointing frees the graph that all layers' coefficients share. Enable it "
                "with use_reentrant=False, which is transformers' default."
            )

        def under_the_same_mixture(*inner: Any, **named: Any) -> Any:
            with self.scope.entered(coefficients, dense, mixture, active):
                return function(*inner, **named)

        return self.original(under_the_same_mixture, *args, **kwargs)
