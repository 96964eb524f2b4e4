"""The only importer of open_clip: its configs, its models without weights, its tokenizers."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cbpt_guard.errors import CheckpointError, InputError

_FILLS = frozenset({"normal_", "uniform_", "clamp_", "erfinv_", "mul_", "add_", "zero_", "fill_", "copy_"})
ModelConfig = dict[str, Any]
"""open_clip's `model_cfg`: embed_dim, vision_cfg, text_cfg, and a few flags."""


def _make_torchvision_importable() -> None:
    """Let open_clip import PyPI's CUDA-built torchvision beside a CPU torch.

    That torchvision cannot load its operator library then, and dies because the schema of `nms` is missing.
    CLIP needs neither operator, so two empty schemas are enough. With a torch that can load the library
    nothing is touched.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)


_KEPT: list[torch.library.Library] = []  # a Library that is garbage collected takes its schemas with it
_make_torchvision_importable()

import open_clip  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP  # noqa: E402
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer  # noqa: E402
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer  # noqa: E402

VERSION: str = open_clip.__version__
_TOKENIZER_OPTIONS: dict[str, tuple[object, ...]] = {
    "clean": ("canonicalize", "lower", "whitespace"),
    "strip_sep_token": (True, False),
}
_BUILD_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, LookupError),
    *(RuntimeError, TypeError, ValueError),
)  # open_clip and timm check little: a wrong config fails wherever its value is first used
_REMOTE_PREFIXES = ("hf-hub:", "hf_hub:", "local-dir:", "http:", "https:")


@cache
def _config_files() -> dict[str, Path]:
    folder = Path(open_clip.__file__).parent / "model_configs"
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def architecture_names() -> list[str]:
    """Names of open_clip's own configs, sorted."""
    return list(_config_files())


def imagenet_prompts(name: str) -> list[str]:
    """A class name in each of CLIP's 80 templates for ImageNet, as open_clip has them."""
    return [template(name) for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def named_config(name: str) -> ModelConfig:
    """open_clip's own config of that name; `InputError` when there is none."""
    path = _config_files().get(name)
    if path is None:
        raise InputError(f"open_clip {VERSION} has no architecture {name!r}; `--arch` takes one of its names or a file")
    config: ModelConfig = json.loads(path.read_text(encoding="utf-8"))
    return config


def refusal(config: ModelConfig) -> str | None:
    """Why cbpt-guard cannot run this architecture, in words; None when it can."""
    text, vision = config.get("text_cfg"), config.get("vision_cfg")
    if not isinstance(text, dict) or not isinstance(vision, dict) or not isinstance(config.get("embed_dim"), int):
        return "a config needs embed_dim, vision_cfg and text_cfg"
    if "multimodal_cfg" in config:
        return "CoCa (a captioning decoder) is not supported"
    reason = _text_refusal(text)
    if reason is not None:
        return reason
    if vision.get("output_tokens"):
        return "a vision tower that gives its tokens beside the features is not supported"
    timm_name = str(vision.get("timm_model_name") or "")
    if timm_name.startswith(_REMOTE_PREFIXES) or "/" in timm_name:
        return f"the vision tower names a remote or local path ({timm_name})"
    return None


def _text_refusal(text: ModelConfig) -> str | None:
    if text.get("hf_model_name"):
        return f"a Hugging Face text tower ({text['hf_model_name']}) is not supported: it needs a download"
    if text.get("embed_cls"):
        return "a text tower with an appended class token is not supported"
    if type(text.get("context_length", 77)) is not int:
        return f"its context_length is no number ({str(text['context_length'])[:60]})"
    asked = text.get("tokenizer_kwargs") or {}
    if not isinstance(asked, dict) or any(value not in _TOKENIZER_OPTIONS.get(key, ()) for key, value in asked.items()):
        return f"tokenizer_kwargs asks for what no published config does ({str(asked)[:60]})"
    return None


class _SkipInit(TorchFunctionMode):
    """Leaves meta tensors unfilled: they hold no values, yet filling them takes most of a build's time."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        target = args[0] if args else (kwargs or {}).get("tensor")
        if getattr(func, "__name__", "") in _FILLS and isinstance(target, Tensor) and target.is_meta:
            return target
        return func(*args, **(kwargs or {}))


def build(config: ModelConfig, device: str = "meta") -> nn.Module:
    """An open_clip model of that config, untrained, in evaluation mode.

    On `meta` no memory is taken; `torch.nn.Module.state_dict` then gives names and shapes.

    Raises:
        CheckpointError: the architecture is not supported, or open_clip refuses the config.
    """
    reason = refusal(config)
    if reason is not None:
        raise CheckpointError(f"this architecture cannot be used: {reason}")
    config = copy.deepcopy(config)
    config["vision_cfg"]["timm_model_pretrained"] = False
    custom_text = config.pop("custom_text", False)
    try:
        with torch.device(device), _SkipInit() if device == "meta" else nullcontext():
            model: nn.Module = (CustomTextCLIP if custom_text else CLIP)(**config)
    except _BUILD_ERRORS as error:
        raise CheckpointError(f"open_clip {VERSION} cannot build this architecture: {error}") from error
    return model.eval().requires_grad_(False)


class Tokenizer:
    """Texts to token ids, padded to the tower's context length.

    Wraps open_clip's own byte-pair tokenizer, or a Hugging Face tokenizer read from a local folder. The config must
    have passed `refusal`: other options than those it lets through open files and sockets.
    """

    def __init__(self, config: ModelConfig, folder: Path | None = None) -> None:
        text = config["text_cfg"]
        self.context_length = text.get("context_length", 77)
        options = dict(text.get("tokenizer_kwargs") or {})
        if folder is None and text.get("hf_tokenizer_name"):
            raise InputError(
                f"this model's tokenizer ({text['hf_tokenizer_name']}) does not come with open_clip and is "
                "not downloaded; put its files into a folder and pass `--tokenizer FOLDER`"
            )
        if folder is None:
            clean = {"clean": options["clean"]} if "clean" in options else {}  # the rest is for tokenizers of a folder
            self._encode: Any = SimpleTokenizer(context_length=self.context_length, **clean)
        else:
            self._encode = _local_tokenizer(folder, self.context_length, options)

    def __call__(self, texts: list[str]) -> Tensor:
        """Token ids (N, L), int64."""
        ids: Tensor = self._encode(texts, context_length=self.context_length)
        return ids


def _local_tokenizer(folder: Path, context_length: int, options: dict[str, Any]) -> HFTokenizer:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder with tokenizer files")
    try:
        return HFTokenizer(
            str(folder),
            context_length=context_length,
            local_files_only=True,
            trust_remote_code=False,
            **options,
        )
    except ImportError as error:
        raise InputError(f"reading the tokenizer in {folder} needs `pip install 'cbpt-guard[tokenizer]'`") from error
    except Exception as error:  # the tokenizer libraries raise anything on a malformed file
        raise InputError(f"{folder} holds no usable tokenizer: {error}") from error


def pooled_by_first_token(module: nn.Module) -> list[nn.ModuleList]:
    """The blocks of every ViT within that pools by its first token: the last block computes the others in vain."""
    found = []
    for tower in module.modules():
        if not isinstance(tower, VisionTransformer) or tower.pool_type != "tok" or tower.attn_pool is not None:
            continue
        blocks: nn.ModuleList = tower.transformer.resblocks
        usual = tower.transformer.batch_first and not tower.output_tokens
        if usual and type(blocks[-1]) is ResidualAttentionBlock:
            found.append(blocks)
    return found
