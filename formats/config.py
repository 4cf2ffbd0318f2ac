"""Read config.json: the shape of a model, and whether model.py computes what it describes.

No key is ignored in silence. A key ends in one of four places:

    read_config    reads it into a `Config`, or compares it with the rest of the file
    NEUTRAL        lists the values for which model.py is right; any other one is refused
    HARMLESS       lists keys that cannot change what is computed, each with the reason
    nowhere        the key is refused by its name, unless it is null

The reader accepts both dialects of transformers. Version 4 writes `rope_theta` and `rope_scaling`,
version 5 `rope_parameters`. An absent key means what it means in transformers' class for that model
type. Keys and defaults are those of transformers 5.23 (configuration_llama.py,
configuration_mistral.py, configuration_utils.py and modeling_rope_utils.py there).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from formats.errors import CheckpointError
from formats.files import read_json
from model import Config

CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}  # by model_type
DTYPES = (None, "float32", "bfloat16", "float16", "float64")

# Keys with the values for which model.py is right. Any other value would change the computation.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False, True),
    "partial_rotary_factor": (None, 1.0, 1),
    "rope_interleaved": (None, False),
    "is_llama_config": (None, True),  # SmolLM2
    "num_local_experts": (None, 1),
    "quantization_config": (None,),
    "use_sliding_window": (None, False, True),
    "is_decoder": (None, False, True),  # the causal mask, which these models always have
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "tie_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
    "dtype": DTYPES,  # to load in: a tensor keeps its own
    "torch_dtype": DTYPES,
}

# Keys that cannot change what is computed, by the reason. They occur in published checkpoints.
HARMLESS = {
    "say where the file comes from and which program wrote it": """
        _name_or_path name_or_path _model_name_or_path _commit_hash transformers_version
        unsloth_version unsloth_fixed transformers.js_config license""",
    "choose a kernel, a cache or an output format": """
        use_cache _attn_implementation _attn_implementation_autoset attn_implementation
        _flash_attn_2_enabled use_flash_attention_2 output_attentions output_hidden_states
        output_scores return_dict return_dict_in_generate torchscript
        tf_legacy_loss""",
    "split one matrix product into several, or recompute it": """
        pretraining_tp chunk_size_feed_forward gradient_checkpointing""",
    "describe the weights before training": "initializer_range",
    "are dropout, which preference training switches off (TRL: disable_dropout)": """
        attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop""",
    "name tokens, which formats/tokenizer.py takes from the tokenizer's files and checks": """
        bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
        bos_token eos_token pad_token unk_token tokenizer_class prefix""",
    "are defaults of transformers' generate(); sample.py has flags for them": """
        max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups
        diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
        no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
        forced_bos_token_id forced_eos_token_id remove_invalid_values suppress_tokens
        begin_suppress_tokens exponential_decay_length_penalty""",
    "belong to classifiers, which `architectures` excludes": """
        id2label label2id num_labels problem_type finetuning_task task_specific_params""",
    "repeat a length; max_position_embeddings is the one that warnings are about": """
        max_sequence_length model_max_length""",
}
HARMLESS_KEYS = {key for keys in HARMLESS.values() for key in keys.split()}


@dataclass
class _Fields:
    """Looks up keys of config.json, and remembers which ones were."""

    path: Path
    raw: dict
    prefix: str = ""  # of a key, for error messages: "rope_scaling."
    taken: set[str] = field(default_factory=set)

    def refuse(self, key: str, why: str) -> NoReturn:
        """Raise CheckpointError. The message holds file, key and value."""
        value = json.dumps(self.raw.get(key))
        value = value if len(value) < 200 else value[:200] + " …"
        raise CheckpointError(f"{self.path}: {self.prefix}{key} = {value}: {why}")

    def take(self, key: str) -> Any:
        """Return the value of a key, or None if it is null or absent."""
        self.taken.add(key)
        return self.raw.get(key)

    def number(self, key: str, default: float | None, kind: type, limit: float) -> float:
        """Return a number in (0, limit] of type `kind`. A float may be written as an int."""
        value = self.take(key)
        if key not in self.raw:
            if default is None:
                raise CheckpointError(f"{self.path}: {self.prefix}{key} is missing")
            value = default
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_number or not 0 < value <= limit:
            self.refuse(key, f"expected a positive {kind.__name__} of at most {limit}")
        return kind(value)

    def integer(self, key: str, default: int | None = None, limit: int = 2**31) -> int:
        """Return an int in (0, limit]."""
        return int(self.number(key, default, int, limit))

    def size(self, key: str, default: int | None = None) -> int:
        """Return one side of a weight matrix; no published model comes near the limit."""
        return self.integer(key, default, limit=2**20)

    def refuse_leftovers(self) -> None:
        """Raise CheckpointError for a key that nobody took; null states nothing."""
        for key, value in self.raw.items():
            if key not in self.taken and value is not None:
                why = "not a key that is understood, and it may change what the model computes"
                self.refuse(key, f"{why}. If it does not, delete it from config.json")


def read_config(folder: Path) -> Config:
    """Read `config.json`.

    Raises:
        CheckpointError: a key is missing or absurd, two keys contradict each other, or model.py
            would silently compute something else than the model was trained with. The message
            names file and key.
    """
    path = folder / "config.json"
    raw = read_json(path, CheckpointError)
    fields = _Fields(path, raw, taken=set(HARMLESS_KEYS))
    kind = fields.take("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        fields.refuse("model_type", f"only {' and '.join(CLASSES)} are supported")
    if fields.take("architectures") not in (None, [], [CLASSES[kind]]):
        fields.refuse("architectures", f"only {CLASSES[kind]} is supported with model_type {kind}")
    for key, supported in NEUTRAL.items():
        if key in raw and not _is_one_of(fields.take(key), supported):
            values = " or ".join(map(json.dumps, supported))
            fields.refuse(key, f"not implemented (only {values})")

    vocabulary, padding = fields.size("vocab_size"), raw.get("pad_token_id")
    if isinstance(padding, int) and not -vocabulary <= padding < vocabulary:
        fields.refuse("pad_token_id", "no row of the embedding, and transformers needs one")
    hidden, heads, kv_heads, head_dim = _read_heads(fields, kind)
    window = _read_window(fields, kind)
    rope_theta, rope_scaling = _read_rope(fields)
    config = Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        num_hidden_layers=fields.integer("num_hidden_layers", limit=2**10),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, float, 2**31),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        sliding_window=window,
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        max_position_embeddings=fields.integer(
            "max_position_embeddings", 2**17 if kind == "mistral" else 2048
        ),
    )
    fields.refuse_leftovers()
    return config


def _is_one_of(value: object, supported: tuple[Any, ...]) -> bool:
    """Say whether a value is among the supported ones, with its type: 0 is not false."""
    return any(type(value) is type(other) and value == other for other in supported)


def _read_heads(fields: _Fields, kind: str) -> tuple[int, int, int, int]:
    """Return hidden size, query heads, key-value heads and features per head."""
    heads = fields.size("num_attention_heads")
    hidden = fields.size("hidden_size")
    head_dim, kv_heads = hidden // heads, heads
    if fields.take("head_dim") is not None:
        head_dim = fields.size("head_dim")
    if hidden % heads and (kind == "llama" or "head_dim" not in fields.raw):  # as transformers does
        fields.refuse("hidden_size", f"not a multiple of num_attention_heads = {heads}")
    if fields.take("num_key_value_heads") is not None:
        kv_heads = fields.size("num_key_value_heads")
    elif kind == "mistral" and "num_key_value_heads" not in fields.raw:
        kv_heads = 8
    if heads % kv_heads:
        fields.refuse("num_key_value_heads", f"does not divide num_attention_heads = {heads}")
    if head_dim % 2:
        fields.refuse("head_dim", "rotary embeddings need an even number of features")
    if heads * head_dim > 2**20:
        fields.refuse("head_dim", f"too many features with num_attention_heads = {heads}")
    return hidden, heads, kv_heads, head_dim


def _read_window(fields: _Fields, kind: str) -> int | None:
    """Return the sliding window; Mistral 7B v0.2 and later have none and say null."""
    value = fields.take("sliding_window")
    if kind == "llama" and value is not None:
        fields.refuse("sliding_window", "transformers' Llama has none: set it to null")
    if kind == "llama" or (value is None and "sliding_window" in fields.raw):
        return None
    if fields.raw.get("use_sliding_window") is False:
        fields.refuse("use_sliding_window", "contradicts sliding_window: set that to null")
    return fields.integer("sliding_window", 4096)


def _read_rope(fields: _Fields) -> tuple[float, dict | None]:
    """Return (theta, scaling) from either dialect; scaling holds Llama 3.1's four numbers or None.

    Raises:
        CheckpointError: another rule than "default" and "llama3", a number that is not positive, a
            key that is not understood, or two statements that contradict each other.
    """
    keys = [
        key for key in ("rope_scaling", "rope_parameters") if fields.take(key) not in (None, {})
    ]
    readings = [_read_rope_object(fields, key) for key in keys or ["rope_parameters"]]
    if readings[0] != readings[-1]:
        fields.refuse("rope_scaling", "contradicts rope_parameters: delete the wrong one")
    return readings[0]


def _read_rope_object(fields: _Fields, key: str) -> tuple[float, dict | None]:
    """Return (theta, scaling) from the object under `key` and the keys beside it."""
    rope = fields.raw.get(key)
    rope = {} if rope is None else rope
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        fields.refuse(key, "expected one flat object for all layers")
    inner = _Fields(fields.path, rope, f"{key}.")
    kind, old_kind = inner.take("rope_type"), inner.take("type")
    if None not in (kind, old_kind) and kind != old_kind:
        inner.refuse("type", f"contradicts rope_type = {json.dumps(kind)}: delete the wrong one")
    name = "type" if kind is None and old_kind is not None else "rope_type"
    if rope.get(name, "default") not in ("default", "llama3"):
        inner.refuse(name, "not implemented (default and llama3 are)")
    for outer_name in ("rope_theta", "original_max_position_embeddings"):
        outer = fields.take(outer_name)
        if None not in (outer, rope.get(outer_name)) and outer != rope[outer_name]:
            inner.refuse(outer_name, f"contradicts {outer_name} = {json.dumps(outer)} outside")
    if not _is_one_of(inner.take("partial_rotary_factor"), (None, 1.0, 1)):
        inner.refuse("partial_rotary_factor", "not implemented (only 1.0 is)")
    source = inner if "rope_theta" in rope else fields
    theta = source.number("rope_theta", 10000.0, float, 1e30)
    inner.taken.add("rope_theta")
    scaling = None
    if rope.get(name) == "llama3":
        names = ("low_freq_factor", "high_freq_factor", "factor")
        scaling = {name: inner.number(name, None, float, 1e30) for name in names}
        length = "original_max_position_embeddings"
        scaling[length] = inner.number(length, None, float, 1e30)
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            inner.refuse("low_freq_factor", "expected less than high_freq_factor")
    inner.refuse_leftovers()
    return theta, scaling
