"""Find the decoder blocks of any transformers causal LM, and its backbone (the model without its LM head).

Layer convention everywhere in Holdfast: layer l is the output of decoder block l (0-based), before the final norm, read
by a forward hook. `hidden_states` is never used, because its last entry is taken after the final norm.
"""

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UserError

BlockOutput = Tensor | tuple[Tensor, ...]

# The attribute in which a loaded model keeps the path of its blocks, so that all code finds the same blocks.
_PATH = "_holdfast_layers_path"


def unwrap(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside DDP, DeepSpeed, `torch.compile` and PEFT wrappers. Adapters stay in place.

    Raises:
        UserError: the innermost model is not a transformers causal LM.
    """
    while not isinstance(model, PreTrainedModel):
        # DDP and DeepSpeed register the wrapped model as `module`, torch.compile as `_orig_mod`.
        inner = model._modules.get("module") or model._modules.get("_orig_mod")
        if inner is not None:
            model = inner
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        else:
            raise UserError(f"{type(model).__name__} is not a transformers causal LM: pass one of AutoModelForCausalLM")
    return model


def find_backbone(model: nn.Module) -> nn.Module:
    """Return the decoder without its LM head.

    `backbone(input_ids=…, attention_mask=…).last_hidden_state` is [B, T, d].
    """
    inner = unwrap(model)
    decoder = inner.get_decoder()
    if decoder is not inner:
        return decoder
    # transformers returns the whole model if it does not know the decoder, as for Llama 4's text models. The decoder is
    # then the module that holds the blocks.
    blocks = find_layers(inner)
    return next(module for module in inner.modules() if any(child is blocks for child in module.children()))


def set_layers_path(model: nn.Module, path: str) -> None:
    """Set the dotted path at which every later `find_layers` looks for this model's decoder blocks.

    Raises:
        UserError: there is no list of modules at the path.
    """
    inner = unwrap(model)
    _layers_at(inner, path)
    vars(inner)[_PATH] = path


def find_layers(model: nn.Module, override: str | None = None) -> nn.ModuleList:
    """Return the decoder blocks in order.

    Args:
        model: a transformers causal LM, bare or wrapped by PEFT, DDP or DeepSpeed.
        override: dotted path of the block list inside the transformers model, for architectures whose blocks are not
            found by shape. None takes the path of `set_layers_path`, if one was set.

    Raises:
        UserError: no list of `num_hidden_layers` modules, or several, or an override that leads nowhere.
    """
    inner = unwrap(model)
    path = override if override is not None else vars(inner).get(_PATH)
    if path is not None:
        return _layers_at(inner, path)
    decoder = inner.get_decoder()
    depth = inner.config.get_text_config().num_hidden_layers
    children = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    candidates = [blocks for blocks in children or _outer_lists(decoder).values() if len(blocks) == depth]
    if len(candidates) != 1:
        raise UserError(
            f"found {len(candidates)} lists of {depth} decoder blocks in {type(decoder).__name__}: name the blocks' "
            f"path with --layers_path, one of {_list_names(inner)}"
        )
    return candidates[0]


def _outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the module lists by path, without the lists inside another list (such as the experts of a block)."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists[name] = module
    return lists


def _list_names(model: nn.Module) -> str:
    return ", ".join(list(_outer_lists(model))[:8]) or "none (this model has no module list)"


def _layers_at(model: nn.Module, path: str) -> nn.ModuleList:
    try:
        layers = model.get_submodule(path)
    except AttributeError as error:
        lists = _list_names(model)
        raise UserError(f"--layers_path {path} is not in {type(model).__name__}: write one of {lists}") from error
    if not isinstance(layers, nn.ModuleList):
        raise UserError(
            f"--layers_path {path} is a {type(layers).__name__}, not the list that holds the blocks: write one of "
            f"{_list_names(model)}"
        )
    return layers


def parse_layers(spec: str | None, n_layers: int, name: str = "layers") -> list[int]:
    """Parse a list of layers, and return their numbers in order.

    Args:
        spec: "all" (or None), "3", "0,2,5", "4-10" (both ends included), or a mix of these.
        n_layers: number of layers of the model.
        name: the flag that holds the text, for the error message.

    Raises:
        UserError: a text that is not a list of layers, or a layer that is out of range.
    """
    if spec is None or spec.strip().lower() == "all":
        return list(range(n_layers))
    chosen: set[int] = set()
    for part in spec.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last) if dash else int(first)
        except ValueError as error:
            raise UserError(f"{name} {spec!r}: {part!r} is not a layer: write all, 3, 0,2,5 or 4-10") from error
        if low > high or high >= n_layers:
            raise UserError(f"{name} {spec!r}: {part.strip()} is out of range: the model has layers 0-{n_layers - 1}")
        chosen.update(range(low, high + 1))
    return sorted(chosen)


def block_output(output: BlockOutput) -> Tensor:
    """Return the residual stream [B, T, d] from the output of a decoder block, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def prove_layers(model: nn.Module, override: str | None = None) -> None:
    """Prove that each decoder block carries the residual stream: change its output, and check that the logits change.

    Raises:
        UserError: a block whose output does not reach the logits (a wrong override, or an unused module).
    """
    layers = find_layers(model, override)
    device = next(model.parameters()).device
    ids = torch.arange(1, 5, device=device).remainder(unwrap(model).config.get_text_config().vocab_size)[None]
    clean = model(input_ids=ids, use_cache=False).logits
    for number, layer in enumerate(layers):

        def shift(_module: nn.Module, _args: object, output: BlockOutput) -> BlockOutput:
            hidden = block_output(output)
            # A ramp over the width, because a LayerNorm would remove a constant shift.
            ramp = torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device, dtype=hidden.dtype)
            moved = hidden + ramp * (1 + hidden.abs().amax())
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        handle = layer.register_forward_hook(shift)
        try:
            moved = model(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
        if torch.equal(clean, moved):
            raise UserError(
                f"layer {number} of {type(unwrap(model)).__name__} does not reach the logits: changing its output "
                "left them the same; name the decoder blocks' path with --layers_path"
            )
