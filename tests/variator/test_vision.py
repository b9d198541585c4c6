"""Image patches are merged in windows or in reading order; class, distillation and register tokens never are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import Idefics3VisionConfig, Idefics3VisionTransformer, PreTrainedModel, TimmWrapperConfig
from transformers.modeling_outputs import BaseModelOutput

from peft_variator import VariatorConfig
from peft_variator.tuners.variator import token_groups
from tests.tiny_models import DUAL, IN_READING_ORDER, TASK_HEADS, VISIONS, Case, by_name

from .reference import feed_forward_of, plugin_output, text_groups, watch, window_groups


CASES = {case.name: case for case in [*VISIONS, *TASK_HEADS]}


def with_plugin(case: Case, **fields: Any) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(case.build(), VariatorConfig(init_weights=False, bottleneck_dim=8, **fields))
    for name, parameter in model.named_parameters():
        if "variator_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def check(model: PeftModel, inputs: dict[str, Any], groups: list[list[int]]) -> None:
    with torch.no_grad():
        seen_networks = watch(model, lambda: model(**inputs))
        assert len(seen_networks) == 2
        for seen in seen_networks:
            batch = seen.inputs.shape[0]
            assert seen.rows == batch * len(groups)
            assert sorted(position for group in groups for position in group) == [*range(seen.inputs.shape[1])]
            network = feed_forward_of(model, seen)
            expected = plugin_output(seen.layer, network, seen.inputs, [groups] * batch, "default")
            atol = 1e-5 * float(expected.abs().max().clamp(min=1))
            torch.testing.assert_close(seen.outputs, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("scoring", ["token", "concat"])
@pytest.mark.parametrize(
    ("ratio", "window"), [(2, (1, 2)), (3, (1, 3)), (4, (2, 2)), (5, (1, 5)), (6, (2, 3)), (8, (2, 4)), (64, (8, 8))]
)
@pytest.mark.parametrize("case", VISIONS, ids=by_name)
def test_windows(case: Case, ratio: int, window: tuple[int, int], scoring: str) -> None:
    """The 6 × 6 patches of these images are no multiple of every window."""
    model = with_plugin(case, compression_ratio=ratio, scoring=scoring)
    check(model, case.inputs(2), window_groups(case.prefix, 6, 6, *window))


@pytest.mark.parametrize("ratio", [2, 4, 5, 100])
@pytest.mark.parametrize("case", VISIONS, ids=by_name)
def test_raster_order(case: Case, ratio: int) -> None:
    model = with_plugin(case, compression_ratio=ratio, patch_grouping="raster")
    check(model, case.inputs(2), text_groups([True] * (36 + case.prefix), range(case.prefix), ratio))


@pytest.mark.parametrize("case", [case for case in IN_READING_ORDER if case.name != "siglip2-vision"], ids=by_name)
def test_patches_of_a_video_are_merged_in_reading_order(case: Case) -> None:
    """What comes first may be a class token, so it is kept."""
    patches = 2 * 36 + (case.name == "vivit")
    check(with_plugin(case), case.inputs(2), text_groups([True] * patches, [0], 4))


def test_images_of_several_shapes_have_padding() -> None:
    case = next(case for case in IN_READING_ORDER if case.name == "siglip2-vision")
    model, inputs = with_plugin(case), case.inputs(2)
    inputs["pixel_attention_mask"][0, 30:] = 0
    inputs["spatial_shapes"][0, 0] = 5
    with torch.no_grad():
        together = model(**inputs).last_hidden_state
        assert [seen.rows for seen in watch(model, lambda: model(**inputs))] == [8 + 9] * 2
        for row, patches in enumerate((30, 36)):
            alone = {
                "pixel_values": inputs["pixel_values"][row : row + 1, :patches],
                "pixel_attention_mask": torch.ones(1, patches, dtype=torch.long),
                "spatial_shapes": inputs["spatial_shapes"][row : row + 1],
            }
            expected = model(**alone).last_hidden_state[0]
            torch.testing.assert_close(together[row, :patches], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("grouping", "rows"), [("window", 6 + 9), ("raster", 5 + 9)])
def test_patches_of_padding_are_never_merged(monkeypatch: pytest.MonkeyPatch, grouping: str, rows: int) -> None:
    """The first image has 4 × 5 patches, filled up to the 6 × 6 of the second."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tower = Idefics3VisionTransformer(Idefics3VisionConfig(**sizes, image_size=24, patch_size=4))
    config = VariatorConfig(init_weights=False, bottleneck_dim=8, patch_grouping=grouping)
    model = get_peft_model(tower, config).eval()
    pixels = torch.randn(2, 3, 24, 24)
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[0, 4:], mask[0, :, 5:] = False, False
    other = pixels.clone()
    other[0, :, 16:], other[0, :, :, 20:] = 7.0, -7.0
    with torch.no_grad():
        first, second = (
            model(pixel_values=each, patch_attention_mask=mask).last_hidden_state for each in (pixels, other)
        )
        seen = watch(model, lambda: model(pixel_values=pixels, patch_attention_mask=mask))
        assert [each.rows for each in seen] == [rows] * 2
        torch.testing.assert_close(first[mask.flatten(1)], second[mask.flatten(1)], rtol=0, atol=1e-5)
        if grouping == "window":
            alone = model(pixel_values=pixels[:1, :, :16, :20]).last_hidden_state[0]
            torch.testing.assert_close(first[0][mask[0].flatten()], alone, rtol=0, atol=1e-4)
        monkeypatch.setattr(token_groups, "_shapes_must_not_depend_on_values", lambda device: True)  # as compiled
        again = model(pixel_values=pixels, patch_attention_mask=mask).last_hidden_state
        torch.testing.assert_close(again[mask.flatten(1)], first[mask.flatten(1)], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(24, 32), (28, 20), (20, 20), (4, 4), (4, 28)])
@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip-vision", "clip-vision"])
def test_images_of_another_size(name: str, height: int, width: int) -> None:
    case = CASES[name]
    model = with_plugin(case)
    inputs = {"pixel_values": torch.randn(2, 3, height, width)}
    if name != "dinov2":
        inputs["interpolate_pos_encoding"] = True
    check(model, inputs, window_groups(case.prefix, height // 4, width // 4, 2, 2))


def test_kept_text_tokens_do_not_touch_images() -> None:
    """keep_first_tokens and keep_last_tokens are about text: the class token is kept without them."""
    model = with_plugin(CASES["deit"], keep_first_tokens=0, keep_last_tokens=5)
    check(model, CASES["deit"].inputs(2), window_groups(2, 6, 6, 2, 2))


def test_image_classification_trains_with_labels() -> None:
    model = with_plugin(CASES["vit-classes"]).train()
    output = model(**CASES["vit-classes"].inputs(2), labels=torch.tensor([0, 1]))
    output.loss.backward()
    # The class token alone is classified: what the last layer gives the patches is not used.
    first = [p.grad for name, p in model.named_parameters() if "variator_" in name and "layers.0." in name]
    assert len(first) == 5
    assert all(gradient is not None and gradient.any() for gradient in first)


@pytest.mark.parametrize("case", DUAL, ids=by_name)
def test_both_towers_of_a_dual_encoder(case: Case) -> None:
    model = with_plugin(case)
    rows = [seen.rows for seen in watch(model, lambda: model(**case.inputs(2, 14)))]
    assert sorted(rows) == sorted([2 * (1 + 3 + 1)] * 2 + [2 * (9 + case.prefix)] * 2)
    text_only = with_plugin(case, compress_vision_tower=False)
    assert [seen.rows for seen in watch(text_only, lambda: text_only(**case.inputs(2, 14)))] == [2 * (1 + 3 + 1)] * 2
    images_only = with_plugin(case, compress_text_tokens=False)
    rows = [seen.rows for seen in watch(images_only, lambda: images_only(**case.inputs(2, 14)))]
    assert sorted(rows) == sorted([2 * 14] * 2 + [2 * (9 + case.prefix)] * 2)


@pytest.mark.parametrize("case", DUAL, ids=by_name)
def test_features_of_each_tower_alone(case: Case) -> None:
    model, inputs = with_plugin(case), case.inputs(2, 14)
    with torch.no_grad():
        both = model(**inputs)
        image = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        text = model.get_text_features(input_ids=inputs["input_ids"]).pooler_output
    for own, shared in ((image, both.image_embeds), (text, both.text_embeds)):
        torch.testing.assert_close(own / own.norm(dim=-1, keepdim=True), shared, rtol=0, atol=1e-5)


class ViTOfTimm(nn.Module):
    """A vision transformer with the names that timm gives its modules."""

    def __init__(self, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.patch_size = (4, 4)
        self.patch_embed.proj = nn.Conv2d(3, dims[0], 4, 4)
        self.blocks = nn.ModuleList(nn.Module() for _ in dims)
        for block, dim in zip(self.blocks, dims, strict=True):
            block.mlp = nn.Module()
            block.mlp.fc1, block.mlp.act, block.mlp.fc2 = nn.Linear(dim, 48), nn.GELU(), nn.Linear(48, dim)
            block.mlp.forward = lambda hidden, mlp=block.mlp: mlp.fc2(mlp.act(mlp.fc1(hidden)))

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        hidden = torch.cat([hidden.mean(1, keepdim=True), hidden], dim=1)  # a class token
        for block in self.blocks:
            hidden = hidden + block.mlp(hidden)
        return hidden


class WrapperOfTimm(PreTrainedModel):
    """As transformers' `TimmWrapperModel`, which needs timm."""

    config: TimmWrapperConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TimmWrapperConfig, dims: tuple[int, ...] = (32, 32)) -> None:
        super().__init__(config)
        self.timm_model = ViTOfTimm(dims)

    def forward(self, pixel_values: Tensor) -> BaseModelOutput:
        return BaseModelOutput(self.timm_model(pixel_values))


def test_models_of_timm() -> None:
    torch.manual_seed(0)
    model = get_peft_model(WrapperOfTimm(TimmWrapperConfig()).eval(), VariatorConfig())
    assert model.targeted_module_names == ["timm_model.blocks.0.mlp", "timm_model.blocks.1.mlp"]
    inputs = {"pixel_values": torch.randn(2, 3, 24, 24)}
    groups = window_groups(1, 6, 6, 2, 2)
    assert [seen.rows for seen in watch(model, lambda: model(**inputs))] == [2 * len(groups)] * 2
    with pytest.raises(ValueError, match="several widths"):
        get_peft_model(WrapperOfTimm(TimmWrapperConfig(), (32, 16)), VariatorConfig())
