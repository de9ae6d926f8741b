"""Read everything that a training run needs except the model's weights, and check it before anything is written."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ...analysis.errors import UserError
from ...analysis.files.artifacts import sha256_file
from ...analysis.models.load import (
    LoadOptions,
    adapter_base,
    check_compatible,
    load_config,
    load_tokenizer,
    model_fingerprint,
    tokenizer_fingerprint,
)
from ...analysis.models.render import document_key, role_mask
from ...analysis.subspace.file import Subspace
from ..config.parsing import Arguments
from ..data.rows import (
    SHIPPED_ANCHORS,
    RenderedRows,
    Row,
    conversation,
    load_rows,
    render_rows,
    split_held_out,
)
from ..data.sources import read_records
from ..protections.kinds import kinds_of, parts_of
from ..protections.rows import inoculated, interleaved
from .report import data_report
from .subspace import load_subspace, subspace_path

# The training flags that decide every step of a run, which a resumed run must repeat. Flags that may change between a
# run and its continuation (saving, logging, paths) are left out.
COURSE = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "optim", "optim_args", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha", "data_seed",
    "max_length", "packing", "completion_only_loss", "loss_type", "bf16", "fp16",
)  # fmt: skip


@dataclass(frozen=True)
class TrainingInputs:
    """What a training run reads.

    Attributes:
        train, held_out, anchors, probes: rows as token ids.
        choices: prompts with classes of answers.
        subspace: the subspace of the protection.
        report: rows, tokens and duplicates of each set, for data.json.
        facts: what must be the same when the run is resumed, for run.json.
    """

    tokenizer: PreTrainedTokenizerBase
    train: RenderedRows
    held_out: RenderedRows | None
    anchors: RenderedRows | None
    probes: RenderedRows | None
    choices: list[dict[str, Any]] | None
    subspace: Subspace | None
    report: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def load_inputs(arguments: Arguments) -> TrainingInputs:
    """Read and check everything that a training run needs except the model's weights. Write nothing.

    Raises:
        UserError: anything that would make the run fail later.
    """
    tokenizer, config = read_starting_model(arguments)
    train, held_out = training_rows(arguments)
    train = _protected_rows(arguments, train)
    anchors = anchor_rows(arguments) if _reads_anchors(arguments) else None
    probes = load_rows(arguments.data.probe_dataset, prompts=True) if arguments.data.probe_dataset else None
    choices = load_choices(arguments.data.choices_dataset) if arguments.data.choices_dataset else None
    subspace = load_subspace(arguments, tokenizer, config)
    rendered = {
        name: render_set(tokenizer, rows, arguments)
        for name, rows in {"train": train, "held_out": held_out, "anchors": anchors, "probes": probes}.items()
        if rows
    }
    _require_roles(arguments, subspace, rendered)
    sets = {"train": train, "held_out": held_out, "anchors": anchors, "probes": probes, "choices": _prompts_of(choices)}
    return TrainingInputs(
        tokenizer=tokenizer,
        train=rendered["train"],
        held_out=rendered.get("held_out"),
        anchors=rendered.get("anchors"),
        probes=rendered.get("probes"),
        choices=choices,
        subspace=subspace,
        report=data_report({name: rows for name, rows in sets.items() if rows}, rendered),
        facts=_facts(arguments, tokenizer, rendered),
    )


def read_starting_model(arguments: Arguments) -> tuple[PreTrainedTokenizerBase, PretrainedConfig]:
    """Return the starting model's tokenizer and configuration.

    Raises:
        UserError: no starting model, an adapter in its place, a revision of a folder, or a base model that does not fit
            the starting model.
    """
    name = arguments.model.model_name_or_path
    if not name:
        raise UserError(
            "no model_name_or_path; name the (instruct) model to start from, like --model_name_or_path folder"
        )
    if adapter_base(name):
        raise UserError(
            f"--model_name_or_path {name} is an adapter; start from its model merged with it (peft: "
            "merge_and_unload().save_pretrained(folder))"
        )
    if arguments.model.model_revision != "main" and Path(name).exists():
        raise UserError(
            f"--model_revision {arguments.model.model_revision}: {name} is a folder, which has no revisions; leave the "
            "flag out, or name a Hub model"
        )
    name, options = arguments.model.starting_model, load_options(arguments)
    config = load_config(name, options)
    if arguments.model.base_model_name_or_path:
        check_compatible(load_config(arguments.model.base_model_name_or_path, options), config)
    return load_tokenizer(name, options), config


def load_options(arguments: Arguments) -> LoadOptions:
    """Return the options with which every model of the run is loaded."""
    model = arguments.model
    return LoadOptions(model.attn_implementation, arguments.training.trust_remote_code, model.layers_path)


def anchor_rows(arguments: Arguments) -> list[Row]:
    """Return the anchors, by default those that ship with Holdfast."""
    return load_rows(arguments.data.anchor_dataset or str(SHIPPED_ANCHORS), prompts=True)


def render_set(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], arguments: Arguments) -> RenderedRows:
    """Render rows as token ids, with the run's --max_length and --long_rows."""
    return render_rows(tokenizer, rows, max_length=arguments.training.max_length, long_rows=arguments.data.long_rows)


def load_choices(source: str) -> list[dict[str, Any]]:
    """Read prompts with listed answers: {"messages": [...], "classes": {class: [answer, ...]}, "split", ...}.

    Raises:
        UserError: a set that cannot be read or is empty, or a malformed row (names file and line).
    """
    rows = []
    for record, where in read_records(source):
        classes = record.get("classes") if isinstance(record, dict) else None
        if not isinstance(classes, dict) or not all(isinstance(answers, list) for answers in classes.values()):
            raise UserError(
                f'{where}: a choices row needs `classes`, like {{"aligned": ["..."], "misaligned": ["..."]}}'
            )
        if not record.get("messages"):
            raise UserError(f"{where}: a choices row needs `messages`, the prompt its answers belong to")
        if not all(isinstance(answer, str) for answers in classes.values() for answer in answers):
            raise UserError(f"{where}: an answer of `classes` is not text; write lists of texts")
        for name in ("split", "domain", "topic"):
            if not isinstance(record.get(name, ""), str | None):
                raise UserError(f"{where}: `{name}` is not text; write its name in quotes")
        rows.append({**record, "messages": conversation(record, where, prompts=True)})
    if not rows:
        raise UserError(f"{source} has no rows; name a set with at least one")
    return rows


def training_rows(arguments: Arguments) -> tuple[list[Row], list[Row] | None]:
    """Return the training rows and the held-out rows, if there are any. Raises UserError."""
    data = arguments.data
    if not data.train_dataset:
        raise UserError("no train_dataset; name the rows to train on, like --train_dataset rows.jsonl")
    rows = load_rows(data.train_dataset, split=data.train_split, limit=data.train_rows)
    if data.held_out_dataset:
        return rows, load_rows(data.held_out_dataset)
    if data.held_out_rows:
        return split_held_out(rows, data.held_out_rows, arguments.training.seed)
    return rows, None


def _protected_rows(arguments: Arguments, rows: list[Row]) -> list[Row]:
    """Return the training rows as changed by inoculation and interleave, the protections that act on rows alone."""
    flags = arguments.protection
    parts = parts_of(flags.protection)
    if "interleave" in parts:
        source = flags.interleave_dataset or arguments.data.anchor_dataset
        if source is None:
            raise UserError("interleave needs safe rows with answers; name them with --interleave_dataset")
        safe = load_rows(source, prompts=True)
    if "inoculation" in parts:
        if flags.inoculation_prompt is None:
            raise UserError("inoculation needs --inoculation_prompt, like: You write insecure code.")
        rows = inoculated(rows, flags.inoculation_prompt)
    # After inoculation, so that the safe rows keep their own system turn.
    if "interleave" in parts:
        rows = interleaved(rows, safe, flags.interleave_share, arguments.training.seed)
    return rows


def _reads_anchors(arguments: Arguments) -> bool:
    flags = arguments.protection
    kinds = kinds_of(flags.protection)
    return any(kind.anchors or (kind.drift and not kind.own_rows and flags.penalty_inputs != "task") for kind in kinds)


def _require_roles(arguments: Arguments, subspace: Subspace | None, rendered: Mapping[str, RenderedRows]) -> None:
    """Raise UserError if a set of rows that the penalty acts on has no token of the penalty's role.

    That role is the subspace's, if the penalty reads the subspace.
    """
    flags = arguments.protection
    answers = any(kind.answers for kind in kinds_of(flags.protection)) and flags.safe_gradient_loss != "kl"
    if answers and not any(any(row.completion_mask) for row in rendered["anchors"].rendered):
        raise UserError(
            f"{flags.protection} reads the anchors' answers, but no anchor has an answer; name rows with an assistant "
            "turn in --anchor_dataset"
        )
    penalties = [kind for kind in kinds_of(flags.protection) if kind.drift and not kind.own_rows]
    if not penalties:
        return
    # With kl the subspace may belong to ablation, which has no role.
    role = flags.protection_tokens or "all"
    if subspace is not None and any(kind.subspace for kind in penalties):
        role = subspace.provenance.role
    inputs = flags.penalty_inputs
    for name in {"task": ["train"], "anchors": ["anchors"], "both": ["train", "anchors"]}[inputs]:
        if not any(any(role_mask(row, role)) for row in rendered[name].rendered):
            raise UserError(
                f"no row of the {name} set has a token of role {role}, which the penalty acts on; use other rows, or "
                "another role (--protection_tokens; for a subspace, --subspace_positions when it is built)"
            )


def _prompts_of(choices: list[dict[str, Any]] | None) -> list[Row] | None:
    if choices is None:
        return None
    return [Row(row["messages"], f"choices {number}") for number, row in enumerate(choices, start=1)]


def _facts(
    arguments: Arguments, tokenizer: PreTrainedTokenizerBase, rendered: Mapping[str, RenderedRows]
) -> dict[str, Any]:
    """Return what a resumed run must repeat, so that its weights equal the weights of an uninterrupted run."""
    model, flags = arguments.model, arguments.protection.as_read()
    facts: dict[str, Any] = {
        "starting weights": model_fingerprint(model.starting_model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        **{f"{name} rows": _documents_sha256(rows) for name, rows in rendered.items() if name in ("train", "anchors")},
        "lora": {name: value for name, value in vars(model).items() if "lora" in name or name == "use_peft"},
        "seed": arguments.training.seed,
        "training": _course(arguments),
        "protection": vars(flags),
    }
    kinds = kinds_of(flags.protection)
    reads_base = any(kind.base for kind in kinds) or flags.penalty_side == "reversion"
    if model.base_model_name_or_path and reads_base:
        facts["base weights"] = model_fingerprint(model.base_model_name_or_path)
    if any(kind.subspace for kind in kinds):
        facts["subspace"] = sha256_file(subspace_path(arguments))
    return json.loads(json.dumps(facts))


def _course(arguments: Arguments) -> dict[str, Any]:
    """Return the flags that decide every optimiser step, with the content of DeepSpeed's configuration."""
    training = arguments.training
    course: dict[str, Any] = {name: getattr(training, name) for name in COURSE}
    # From `given`, since the process that only checks does not set DeepSpeed up. Under torchrun the number of processes
    # is not in the flag but in WORLD_SIZE.
    deepspeed = deepspeed_content(arguments.given.get("deepspeed"))
    processes = int(os.environ.get("WORLD_SIZE", training.num_processes))
    return {**course, "dtype": arguments.model.dtype, "num_processes": processes, "deepspeed": deepspeed}


def deepspeed_content(config: Any) -> Any:
    """Load a DeepSpeed config from a path or a JSON string; return anything else unchanged."""
    if not isinstance(config, str):
        return config
    return json.loads(config if config.startswith("{") else Path(config).read_text(encoding="utf-8"))


def _documents_sha256(rows: RenderedRows) -> str:
    return hashlib.sha256("".join(document_key(row.input_ids) for row in rows.rendered).encode()).hexdigest()
