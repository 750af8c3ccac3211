"""Builds small models from the configs of large ones, judging settings by their names, and finds inputs for them.

No architecture is named here. The name of a setting tells what it means. If the resulting model does not run, other
sizes are tried; if none works, the model is listed with the first reason.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.trial import NotBuiltError, Subject, outputs, seed
from benchmarks.workload import reason

LIMIT = 30_000_000  # parameters
VOCABULARY, POSITIONS, EXPERTS = 512, 512, 4
HEAD, MOST_HEADS = 16, 4
# ways to reduce the widths of a model: from its number of heads, by a fixed divisor, or not at all
WAYS: tuple[str | int, ...] = ("heads", 4, 8, 1)

# the heads (task classes) to try for a model type, in this order
HEADS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM", "CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CTC",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION", "DEPTH_ESTIMATION", "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION",
    "TIME_SERIES_PREDICTION",
)  # fmt: skip

LAYERS = re.compile(
    r"(^|_)(num_)?(hidden_|encoder_|decoder_|attention_|transformer_|text_|vision_|conv_|res_|lstm_|dense_)*layers?$"
    r"|^n_layers?$|^depth$|_depth$|_num_layers$|num_.*_layers$|^num_(\w+_)?blocks$|num_.*_blocks$|_layers$"
)
NOT_LAYERS = re.compile(
    r"vision_feature_layer|insert_layer|feature_layer|iou_head_depth|max_window_layers|no_rope|deepstack|num_stages"
)
INDICES = re.compile(r"indexe?s$|_idxs?$|layer_ids$|_indices$|_layers$")
HEAD_COUNTS = re.compile(r"(^|_)(n|num)?_?(attention_|kv_|key_value_|key_|value_|mamba_|query_)*heads?$|_heads$")
HEAD_SIZES = re.compile(r"head_dim$|^d_kv$|headdim$|d_head$|dim_head$|^rotary_dim$|head_size$")
WIDTHS = re.compile(
    r"hidden_size|hidden_dim|intermediate|^d_model$|^n_embd$|^n_inner$|_dims?$|^dim$|channels$|ffn|^d_ff$|mlp_dim"
    r"|projection|lora_rank|_rank$|width|filters$|_units$|embedding_size$|hidden_sizes|_features$|output_size$"
    r"|pooler_size|^d_|base_channel|_size_per_layer|dim_per_stage$|channel_list$"
)
NOT_WIDTHS = re.compile(
    r"num_channels|audio_channels|image_channels|^in_channels$|kernel|stride|layers?$|type|act|ratio|num_|^n_(?!embd|inner)"
    r"|codebook_size|d_state|d_conv|d_rel|axes|vocab|position|time_dim|input_dim|mel|_expansion|multiplier|dilation|groups|bias"
)
# values for settings that are None by default in some configs, but without which no model can be built
OPEN = {
    "num_experts_per_tok": 2,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "vocab_size": VOCABULARY,
    "prediction_length": 4,
    "context_length": 32,
    "pad_token_id": 0,
    "image_token_index": VOCABULARY - 1,
    "default_language": "en_XX",
}
TOKENS = re.compile(r"_token_ids?$|_token_index$|_token$|token_id_")


def smaller_heads(count: int) -> int:
    """The largest power of two up to `MOST_HEADS` that divides `count`."""
    return math.gcd(count, MOST_HEADS)


def configs_in(config: Any) -> Iterator[Any]:
    """`config` and the configs nested in it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from configs_in(value)


def first_of(config: Any, *names: str) -> Any:
    """The first setting with one of these names that is a positive integer; None if there is none."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except Exception:  # in some configs the setting exists only per layer
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


class Shrinking:
    """Reduces the settings of a config and of its nested configs; equal values stay equal."""

    def __init__(self, config: Any, way: str | int) -> None:
        self.way = way
        self.widths: dict[int, int] = {}
        self.tokens: dict[int, int] = {}
        every = list(configs_in(config))
        if way == "heads":
            for one in every:
                hidden, heads = self.main_sizes(one)
                if hidden and heads and hidden % heads == 0:
                    made = smaller_heads(heads) * HEAD
                    self.widths[hidden] = max(made, self.widths.get(hidden, 0))
        for one in every:
            self.shrink(one)

    @staticmethod
    def main_sizes(config: Any) -> tuple[Any, Any]:
        """The width and the number of heads of a config's blocks."""
        hidden = first_of(
            config, "hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "dim", "encoder_hidden_size"
        )
        heads = first_of(config, "num_attention_heads", "n_head", "encoder_attention_heads", "num_heads", "n_heads",
                         "decoder_attention_heads", "attention_heads")  # fmt: skip
        return hidden, heads

    def shrink(self, config: Any) -> None:
        """Changes the settings of one config, without its nested configs."""
        hidden, heads = self.main_sizes(config)
        smaller = self.widths.get(hidden) if hidden else None
        divisor = hidden / smaller if smaller else (self.way if isinstance(self.way, int) else 8)
        before = {name: value for name, value in vars(config).items() if not name.startswith("_")}
        self.original = before
        if not isinstance(getattr(config, "stage_names", None), (list, tuple)):
            stages = 0
        else:
            stages = len(config.stage_names) - 1
        count = max([value for name, value in before.items() if _is_layers(name, value)], default=0)
        kept = list(range(min(count, 4))) if count == stages > 0 else self.kept_layers(before, count)
        for name, value in before.items():
            try:
                changed = self.changed(config, name, value, divisor, heads, hidden, count, kept)
                if changed is not value and changed != value:
                    setattr(config, name, changed)
            except Exception:  # a setting that cannot be changed
                continue
        self.settle(config, count, len(kept))

    @staticmethod
    def settle(config: Any, count: int, kept: int) -> None:
        """Adjusts settings that depend on others."""
        hidden, heads = Shrinking.main_sizes(config)
        for name, value in OPEN.items():
            if vars(config).get(name, value) is None:
                setattr(config, name, value)
        if hidden and heads:
            for name, value in (("head_dim", hidden // heads), ("num_key_value_heads", heads)):
                if vars(config).get(name, value) is None:
                    setattr(config, name, value)
            size = first_of(config, "head_dim") or hidden // heads
            for name in ("rope_parameters", "rope_scaling"):
                _fit_sections(getattr(config, name, None), size, getattr(config, "partial_rotary_factor", None))
        image, patch = first_of(config, "image_size"), first_of(config, "patch_size")
        if image and patch and first_of(config, "image_embedding_size"):
            config.image_embedding_size = image // patch
        # a backbone whose stages are its layers
        if (stages := getattr(config, "stage_names", None)) and count > kept and len(stages) == count + 1:
            outs = getattr(config, "_out_indices", None)
            config.stage_names = list(stages[: kept + 1])
            if outs:
                config._out_indices = list(range(kept + 1))[-len(outs) :]
                config._out_features = [stages[i] for i in config._out_indices]

    @staticmethod
    def kept_layers(settings: dict[str, Any], count: int) -> list[int]:
        """The indices of the layers to keep: the first two, or one of every kind."""
        lists = [v for v in settings.values() if isinstance(v, (list, tuple)) and len(v) == count and count > 4]
        kinds = list(zip(*(map(str, v) for v in lists), strict=True)) if lists else []
        first = sorted({kinds.index(kind) for kind in kinds})[:4]
        # a setting that lists n layers by index (as outputs, for example) needs n layers; at most four are kept
        named = [len(v) for name, v in settings.items() if isinstance(v, (list, tuple)) and INDICES.search(name)]
        return first if len(first) > 1 else list(range(min(count, max([2, *(n for n in named if n <= 4)]))))

    def width(self, value: int, divisor: float) -> int:
        """A smaller width; equal widths give equal results."""
        if value < 32:
            return value
        if value not in self.widths:
            exact = value / divisor
            self.widths[value] = int(exact) if exact == int(exact) and exact >= 8 else max(8, 8 * round(exact / 8))
        return self.widths[value]

    def changed(
        self, config: Any, name: str, value: Any, divisor: float, heads: Any, hidden: Any, count: int, kept: list[int]
    ) -> Any:
        """The new value of a setting."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, (list, tuple)) and value:
            return self.changed_list(name, value, divisor, count, kept)
        if not whole or value <= 0:
            return value
        if TOKENS.search(name):
            return value if value < VOCABULARY else self.tokens.setdefault(value, VOCABULARY - 1 - len(self.tokens))
        if "vocab" in name or name in ("codebook_size", "audio_codebook_size", "num_embeddings"):
            return min(value, VOCABULARY)
        if name == "max_source_positions":
            return min(value, 64)
        if re.search(r"max_position|n_positions|n_ctx|max_target_positions|seq_len|context_length", name):
            return min(value, POSITIONS)
        if re.search(r"experts_per_tok|moe_topk|top_k$|moe_k$|num_selected_experts", name):
            return min(value, 2)
        if re.search(r"shared_experts", name):
            return min(value, 1)
        if re.search(r"experts$", name):
            return min(value, EXPERTS)
        if name in ("n_group", "num_expert_group", "topk_group"):
            return min(value, 1 if name == "topk_group" else 2)
        if name in (
            "num_queries",
            "num_query_tokens",
            "num_denoising",
            "num_detection_tokens",
            "two_stage_num_proposals",
        ):
            return min(value, 8)
        if name == "window_size" and (first_of(config, "patch_size") or 8) <= 4:
            return 2
        if name in ("n_groups", "mamba_n_groups"):  # groups of heads
            return 1
        if name in ("num_groups", "norm_num_groups"):
            return min(value, 4)
        if name == "num_pos_feats":  # half the width that they are added to
            return self.width(2 * value, divisor) // 2
        if name == "upsample_groups":
            return self.width(value, divisor)
        if name in ("sliding_window", "attention_window"):
            return min(value, 16)
        if name.endswith("attn_chunk_length"):
            return min(value, 4)
        if name in ("image_size", "pretrain_image_size") and self.way != 1:
            patch = first_of(config, "patch_size") or 8
            return min(value, 4 * patch if patch > 4 else 64)
        if _is_layers(name, value):
            # keep all stages: other settings are lists of that length
            lists = (v for v in self.original.values() if isinstance(v, (list, tuple)))
            stages = value <= 4 and any(len(v) == value for v in lists)
            return value if stages else len(kept) if value == count else min(value, 2)
        if self.way == 1:
            return value
        if HEAD_SIZES.search(name):
            return self.head_size(value, heads, hidden)
        if HEAD_COUNTS.search(name):
            return self.heads_of(name, value, heads)
        if WIDTHS.search(name) and not NOT_WIDTHS.search(name):
            return self.width(value, divisor)
        return value

    def heads_of(self, name: str, value: int, heads: Any) -> int:
        """The new number of heads."""
        if self.way != "heads":
            return value
        if heads and value != heads and ("kv" in name or "key_value" in name):
            ratio = heads // value if value <= heads else 1
            return max(1, smaller_heads(heads) // ratio)
        return smaller_heads(value)

    def head_size(self, value: int, heads: Any, hidden: Any) -> int:
        """The new size of a head."""
        if self.way != "heads":
            return max(4, value // int(self.way)) if value % int(self.way) == 0 else value
        expand = self.original.get("mamba_expand", self.original.get("expand", 1))
        inner = self.original.get("mamba_n_heads", self.original.get("mamba_num_heads", heads if expand > 1 else None))
        if inner and hidden in self.widths and inner * value == expand * hidden:
            return int(expand * self.widths[hidden] // smaller_heads(inner))
        if heads and hidden == heads * value:
            return self.widths[hidden] // smaller_heads(heads)
        return value // 8 if value % 8 == 0 and value > 16 else value

    def changed_list(self, name: str, value: Sequence[Any], divisor: float, count: int, kept: list[int]) -> Any:
        """The new value of a setting that is a list."""
        kind: Any = type(value)
        numbers = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
        if count > 4 and len(value) == count and not name.endswith("token_id"):
            value = kind(value[i] for i in kept)
            return kind(min(v, 2) for v in value) if numbers and "kv_heads" in name else value
        if not numbers:
            return value
        if name == "axial_pos_shape":
            return kind((3, 4))  # a grid of positions; a training batch must fill all of them
        if TOKENS.search(name):
            return kind(
                v if v < VOCABULARY else self.tokens.setdefault(v, VOCABULARY - 1 - len(self.tokens)) for v in value
            )
        if re.search(r"^depths$|^layers$|num_blocks|layer_depths|stage_num_blocks", name):
            return kind(min(v, 2) for v in value)
        if INDICES.search(name) and count:
            inside = [i for i in value if i < len(kept)]
            if len(inside) < len(value) <= len(kept):
                return kind(range(len(kept) - len(value), len(kept)))
            return kind(inside or [len(kept) - 1])
        widths = name == "in_channels" or (WIDTHS.search(name) and not NOT_WIDTHS.search(name))
        if self.way != 1 and widths and max(value) >= 32:
            by = divisor if self.way != "heads" else min(divisor, 8)
            return kind(
                v if v < 8 else max(4, round(v / by)) if self.way != "heads" else self.list_width(v, by) for v in value
            )
        return value

    def list_width(self, value: int, by: float) -> int:
        """The new value of a width in a list, regardless of heads, which are in another list."""
        return self.widths.get(value) or (value if value <= 32 else max(8, round(value / 4)))


def _fit_sections(rope: Any, head: int, partial: float | None) -> None:
    """Divides the rotary frequencies among the axes in the same proportions as before."""
    if not isinstance(rope, dict):
        return
    for value in rope.values():
        _fit_sections(value, head, partial)
    if "rope_type" in rope:
        # without this setting, multi-axis models would use large default sections; other models ignore it
        sections = rope.get("mrope_section") or [1, 1, 1]
        total = int(head * (rope.get("partial_rotary_factor") or partial or 1)) // 2
        made = [max(1, total * section // sum(sections)) for section in sections]
        rope["mrope_section"] = [total - sum(made[1:]), *made[1:]]


def _is_layers(name: str, value: Any) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return whole and bool(LAYERS.search(name)) and not NOT_LAYERS.search(name)


def made(config: Any, kind: Any) -> nn.Module:
    """A model with random weights; raises NotBuiltError if it is too large."""
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in kind._from_config(copy.deepcopy(config)).parameters())
        except Exception:
            size = 0  # a model that cannot be built on the meta device may still be built on the CPU
    if size > LIMIT:
        raise NotBuiltError(f"too large: {size:,d} parameters after all reductions")
    seed()
    model = kind._from_config(config).float().eval()
    size = sum(p.numel() for p in model.parameters())
    if size > LIMIT:
        raise NotBuiltError(f"too large: {size:,d} parameters after all reductions")
    return perturbed(model)


@torch.no_grad()
def perturbed(model: nn.Module) -> nn.Module:
    """Adds a little noise to every weight, because weights that start as zeros would hide differences."""
    seed()
    for p in model.parameters():
        if p.is_floating_point():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def ids(config: Any, length: int = 12) -> Tensor:
    """Random token ids without special tokens."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = [v for n, v in vars(text).items() if "vocab_size" in n and isinstance(v, int) and v > 8]
    special: set[int] = set()
    for one in configs_in(config):
        for name, value in vars(one).items():
            if TOKENS.search(name):
                special.update(
                    v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, int)
                )
    usable = [i for i in range(4, min([*sizes, 200])) if i not in special]
    return torch.tensor(usable)[torch.randint(len(usable), (2, length))]


def image_shape(config: Any) -> tuple[int, int, int]:
    """Channels, height and width of an image."""
    channels, side = 3, None
    for one in configs_in(config):
        channels = first_of(one, "num_channels") or (first_of(one, "in_channels", "in_chans") or channels)
        sizes = (getattr(one, name, None) for name in ("image_size", "input_size", "max_img_size"))
        size = next(filter(None, sizes), None)
        if side is None and isinstance(size, int):
            side = size, size
        elif side is None and isinstance(size, (list, tuple)) and len(size) == 2:
            side = int(size[0]), int(size[1])
    return (channels, *(side or (64, 64)))


def value_for(name: str, config: Any, form: int, flat: bool) -> Any:
    """An input for an argument of this name; None if its form is unknown.

    Args:
        name: the name of the argument.
        config: the model's config.
        form: index of the shape to use, if such an input can have several.
        flat: whether images are passed as one list of patches, with a grid for each image.
    """
    every = list(configs_in(config))

    def setting(default: int, *names: str) -> int:
        return next((found for one in every if (found := first_of(one, *names))), default)

    channels, height, width = image_shape(config)
    mels = setting(80, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "input_dim")
    hidden, patch = setting(64, "hidden_size", "d_model"), setting(16, "patch_size")
    frames, source = setting(2, "num_frames", "frames_per_clip"), setting(0, "max_source_positions")
    past = setting(32, "context_length") + max(getattr(config, "lags_sequence", None) or [0])
    variables = setting(0, "num_input_channels") or setting(1, "input_size")
    # a single variable has an axis only if the model treats it as a channel
    series = (2, past, variables) if variables > 1 or setting(0, "num_input_channels") else (2, past)
    length, pixels = 2 * source or 128, channels * setting(1, "temporal_patch_size") * patch**2
    image = channels, height, width
    images = [(2, *image), (2, frames, *image), (2, 16, channels * patch**2), (2, 1, *image)]
    speech = [(2, mels, length), (2, length, mels), (2, length, 2 * mels), (2, 1, length, mels)]
    if not source:
        speech[:2] = speech[1::-1]
    waves = [(2, 7680), (2, 1, 7680), (2, 2, 7680), (2, 1, 1920)]
    patches = (32, pixels)
    makers: dict[str, Callable[[], Any]] = {
        "input_ids": lambda: ids(config), "decoder_input_ids": lambda: ids(config, 6),
        "qformer_input_ids": lambda: ids(config, 6),
        "task_inputs": lambda: ids(config, setting(77, "task_seq_len")),
        "attention_mask": lambda: torch.ones(2, 12, dtype=torch.int64),
        "token_type_ids": lambda: torch.zeros(2, 12, dtype=torch.int64),
        "position_ids": lambda: torch.arange(12).expand(2, 12).clone(),
        "pixel_values": lambda: torch.randn(patches if flat else images[form]),
        "pixel_values_videos": lambda: torch.randn(2, frames, channels, height, width),
        "pixel_mask": lambda: torch.ones(2, height, width, dtype=torch.int64),
        "image_attention_mask": lambda: torch.ones(2, 12, 1, dtype=torch.int64),
        "pixel_attention_mask": lambda: torch.ones(2, 16, dtype=torch.int64),
        "spatial_shapes": lambda: torch.tensor([[4, 4], [4, 4]]),
        "grid_thw": lambda: torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "image_grid_thw": lambda: torch.tensor([[1, 4, 4], [1, 4, 4]]),
        "tgt_sizes": lambda: torch.tensor([[4, 4], [4, 4]]),
        "target_sizes": lambda: torch.tensor([[4, 4], [4, 4]]),
        "merge_sizes": lambda: torch.tensor([1, 1]),
        "input_features": lambda: torch.randn(speech[form]),
        "input_features_mask": lambda: torch.ones(2, length, dtype=torch.int64),
        "input_values": lambda: torch.randn(waves[form]),
        "audio_values": lambda: torch.randn(2, 1, 7680),
        "padding_mask": lambda: torch.ones(waves[form], dtype=torch.bool),
        "bbox": lambda: torch.tensor([[1, 2, 30, 40]]).expand(2, 12, 4).clone(),
        "inputs_embeds": lambda: torch.randn(2, 12, hidden),
        "hidden_states": lambda: torch.randn(patches if flat else (2, 12, hidden)),
        "encoder_hidden_states": lambda: torch.randn(2, 12, setting(hidden, "encoder_hidden_size")),
        "image_embeds": lambda: torch.randn(2, 12, hidden), "query_embeds": lambda: torch.randn(2, 12, hidden),
        "visual_feats": lambda: torch.randn(2, 4, setting(64, "visual_feat_dim")),
        "visual_pos": lambda: torch.rand(2, 4, 4),
        "past_values": lambda: torch.randn(series), "past_observed_mask": lambda: torch.ones(series),
        "past_time_features": lambda: torch.randn(2, past, setting(0, "num_time_features")),
        "timestep": lambda: torch.tensor([1, 2]),
    }  # fmt: skip
    return makers[name]() if name in makers else None


OFTEN = ("input_ids", "pixel_values", "input_features", "input_values", "pixel_values_videos", "decoder_input_ids")


def guesses(model: nn.Module, config: Any) -> Iterator[list[str]]:
    """Lists of input names to try, the likeliest first."""
    signature = inspect.signature(model.forward).parameters
    needed = [
        n for n, p in signature.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    main = getattr(model, "main_input_name", None) or []
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in signature else []
    first = [name for name in ([main] if isinstance(main, str) else main) if name in signature]
    yield list(dict.fromkeys([*first, *needed, *decoder]))
    if needed:
        yield needed
    yield list(dict.fromkeys([*first, *needed]))
    for name in OFTEN:
        if name in signature and [name] != first:
            yield list(dict.fromkeys([name, *needed, *decoder]))
    yield [name for name in OFTEN if name in signature]
    # all known inputs; of several that mean the same, only the simplest
    known = [name for name in signature if value_for(name, config, 0, flat=False) is not None]
    yield [name for name in known if not name.endswith(("embeds", "hidden_states", "position_ids", "mask"))]
    yield [name for name in known if not name.endswith(("embeds", "hidden_states"))]


FORMS = 4


def fed(model: nn.Module, config: Any) -> dict[str, Any]:
    """Inputs that the model accepts; raises NotBuiltError with the first reason if none are found."""
    signature = inspect.signature(model.forward).parameters
    fixed = {"use_cache": False} if "use_cache" in signature else {}
    reasons: list[str] = []

    def tried(names: list[str], form: int) -> dict[str, Any] | None:
        asked: set[str] = set()
        for _ in range(4):
            seed()
            flat = not {"grid_thw", "image_grid_thw"}.isdisjoint(names)
            inputs = {name: value_for(name, config, form, flat) for name in names} | fixed
            if missing := [name for name, value in inputs.items() if value is None]:
                reasons.append(f"no inputs are known for {', '.join(missing)}")
                return None
            try:
                if outputs(model, inputs):
                    return inputs
                reasons.append("its outputs contain no floating-point tensor")
                return None
            except Exception as error:
                reasons.append(reason(error))
                # the error message often names the missing argument
                words = re.findall(r"\w+", str(error).lower())
                named = [n for n in signature if n.lower() in words and n not in (*names, *asked)]
                named = [n for n in named if value_for(n, config, form, flat) is not None]
                # of several inputs that mean the same, take the simplest
                named = [n for n in named if not n.endswith("embeds")] or named
                if not named:
                    return None
                asked.update(named)
                names = [*names, *named]
        return None

    for names in guesses(model, config):
        several = not {"pixel_values", "input_features", "input_values"}.isdisjoint(names)
        for form in range(FORMS if several else 1):
            if (inputs := tried(names, form)) is not None:
                return inputs
    raise NotBuiltError(f"cannot be called: {reasons[0] if reasons else 'no input is known'}")


def config_of(model_type: str) -> Any:
    """The default config of a model type; raises NotBuiltError if there is none."""
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[model_type]()
    except Exception as error:
        raise NotBuiltError(f"no default config: {reason(error)}") from None


def subject(model_type: str, name: str) -> Subject:
    """A small model of transformers and its inputs."""
    import transformers

    try:
        kind: Any = getattr(transformers, name)
    except Exception as error:
        raise NotBuiltError(f"cannot be imported: {reason(error)}") from None
    reasons = []
    for way in WAYS:
        config = config_of(model_type)
        Shrinking(config, way)
        # some models are built from a part of their type's config
        for part in configs_in(config):
            try:
                model = made(part, kind)
            except NotBuiltError as error:
                reasons.append(str(error))
                break
            except Exception as error:
                reasons.append(f"cannot be made: {reason(error)}")
                continue
            try:
                return Subject(model, fed(model, model.config))
            except NotBuiltError as error:
                reasons.append(str(error))
                break
    raise NotBuiltError(reasons[0])


def architectures() -> dict[str, str]:
    """One class per model type, by the type; each class appears once."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    mappings = {
        name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES"): value
        for name, value in vars(modeling_auto).items()
        if name.endswith("MAPPING_NAMES") and name != "CONFIG_MAPPING_NAMES"
    }
    order = [*HEADS, "MODEL", *mappings]
    mappings["MODEL"] = mappings.pop("MODEL_MAPPING_NAMES", mappings.get("MODEL", {}))
    found: dict[str, str] = {}
    for model_type in sorted(CONFIG_MAPPING_NAMES, key=len):  # of types that share a class, the shortest name
        for head in order:
            named = mappings.get(head, {}).get(model_type)
            if named:
                named = named if isinstance(named, str) else named[0]
                if named not in found.values():
                    found[model_type] = named
                break
    return found
