"""timm's model contract, over every model that this package registers."""

import copy
from functools import cache

import pytest
import timm
import torch
from torch import Tensor, nn

import backbones
from tests.tolerances import AUTOCAST, SAME_FUNCTION

NAMES = sorted(name for module in backbones.__all__ for name in timm.list_models(module=module))
PLAIN = ("vim", "lbvim")
SMALLEST = ("vim_tiny",)

every_model = pytest.mark.parametrize("name", NAMES)
each_family = pytest.mark.parametrize("name", SMALLEST)


def is_plain(name: str) -> bool:
    return name.startswith(PLAIN)


def create(name: str, **kwargs: object) -> nn.Module:
    """A model for 64 x 64 pixels, on 10 classes."""
    size = {"img_size": 64} if is_plain(name) else {}
    return timm.create_model(name, **{"num_classes": 10, **size, **kwargs})


@cache
def shared(name: str) -> nn.Module:
    """One instance in eval mode for the tests that do not change it."""
    torch.manual_seed(0)
    return create(name).eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))


def total(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A number that depends on every output; training mode may return one for each of two heads."""
    return sum(x.square().mean() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))


def test_the_promised_names_are_registered() -> None:
    assert {"vim_tiny", "vim_small", "vim_base", "vim_tiny_stride8", "vim_small_stride8"} <= set(NAMES)


@every_model
def test_forward(name: str) -> None:
    with torch.no_grad():
        logits = shared(name)(images())
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()


@every_model
def test_features_and_head_compose(name: str) -> None:
    model = shared(name)
    with torch.no_grad():
        features = model.forward_features(images())
        assert features.shape[-1] == model.num_features
        torch.testing.assert_close(model.forward_head(features), model(images()))
        assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@each_family
def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = create(name).train()
    total(model(images())).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@each_family
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model = create(name).train()
    results = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        loss = total(model(images()))
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


@every_model
def test_classifier_can_be_replaced_and_removed(name: str) -> None:
    model = copy.deepcopy(shared(name))
    features = model.forward_features(images()[:1])
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.forward_head(features).shape == (1, 3)
    model.reset_classifier(0)
    assert model.forward_head(features).shape == (1, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape


@each_family
def test_built_without_classifier_and_pooling(name: str) -> None:
    model = create(name, num_classes=0, global_pool="").eval()
    with torch.no_grad():
        assert model(images()).shape == model.forward_features(images()).shape


@each_family
def test_grey_images(name: str) -> None:
    with torch.no_grad():
        assert create(name, in_chans=1).eval()(images(1, 1, 64, 64)).shape == (1, 10)


@every_model
def test_intermediates(name: str) -> None:
    model = shared(name)
    other = "NLC" if is_plain(name) else "NHWC"
    with torch.no_grad():
        final, maps = model.forward_intermediates(images(), norm=False)
        torch.testing.assert_close(final, model.forward_features(images()))
        assert len(maps) == len(model.feature_info)
        for info, feature in zip(model.feature_info, maps, strict=True):
            side = 64 // info["reduction"] - (info["reduction"] < 16 and is_plain(name))
            assert feature.shape == (2, info["num_chs"], side, side)
        rows = model.forward_intermediates(images(), indices=[-1], output_fmt=other, intermediates_only=True)
        expected = maps[-1].flatten(2).transpose(1, 2) if is_plain(name) else maps[-1].permute(0, 2, 3, 1)
        torch.testing.assert_close(rows[0], expected)
        early = model.forward_intermediates(images(), indices=[0], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], maps[0])
    with pytest.raises(ValueError, match="output_fmt: got 'CHW'"):
        model.forward_intermediates(images(), output_fmt="CHW")


@each_family
def test_features_only(name: str) -> None:
    model = create(name, features_only=True, out_indices=[0, 1]).eval()
    whole = create(name).eval()
    whole.load_state_dict({**whole.state_dict(), **model.model.state_dict()})
    with torch.no_grad():
        expected = whole.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)
        for found, wanted, channels in zip(
            model(images()), expected, model.feature_info.channels(), strict=True
        ):
            torch.testing.assert_close(found, wanted)
            assert found.shape[1] == channels


@each_family
def test_pruning_keeps_what_is_asked_for(name: str) -> None:
    model = create(name).eval()
    with torch.no_grad():
        expected = model.forward_intermediates(images(), indices=[1], intermediates_only=True)
        assert model.prune_intermediate_layers([1]) == [1]
        torch.testing.assert_close(
            model.forward_intermediates(images(), indices=[1], intermediates_only=True), expected
        )
        model(images())


@each_family
@pytest.mark.parametrize("size", [(64, 96), (57, 83), (33, 71)])
def test_any_image_size(name: str, size: tuple[int, int]) -> None:
    model = create(name, **({"dynamic_img_size": True} if is_plain(name) else {})).eval()
    with torch.no_grad():
        assert model(images(1, 3, *size)).isfinite().all()
        assert all(
            x.isfinite().all()
            for x in model.forward_intermediates(images(1, 3, *size), intermediates_only=True)
        )


@each_family
def test_images_that_do_not_fit_are_named(name: str) -> None:
    with pytest.raises(ValueError, match="x: got an image of 31 x 64 pixels"):
        shared(name)(images(1, 3, 31, 64))
    if is_plain(name):
        with pytest.raises(ValueError, match="expected at least one patch of 16"):
            create(name, dynamic_img_size=True)(images(1, 3, 64, 15))


@each_family
def test_autocast(name: str) -> None:
    model = shared(name)
    with torch.no_grad():
        expected = model(images())
        with torch.autocast("cpu", torch.bfloat16):
            found = model(images())
            assert all(p.isfinite().all() for p in (found, model(100 * images())))
    error = (found - expected).float().square().mean().sqrt() / expected.square().mean().sqrt()
    assert error <= AUTOCAST


@each_family
def test_device_and_dtype_of_construction(name: str) -> None:
    assert {p.device.type for p in create(name, device="meta").parameters()} == {"meta"}
    assert {p.dtype for p in create(name, dtype=torch.float64).parameters()} == {torch.float64}


@each_family
def test_double_precision_agrees(name: str) -> None:
    with torch.no_grad():
        exact = copy.deepcopy(shared(name)).double()(images()[:1].double())
        assert exact.dtype == torch.float64
        torch.testing.assert_close(shared(name)(images()[:1]).double(), exact, rtol=1e-4, atol=1e-4)


@every_model
def test_parameters_are_grouped_by_depth(name: str) -> None:
    model = shared(name)
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    ids = {key: groups[key] for key, _ in model.named_parameters()}
    blocks = [
        p for key, p in ids.items() if ".0." in key and key.startswith(("blocks.0.", "stages.0.blocks.0."))
    ]
    assert (
        max(ids.values())
        == ids["head.weight" if "head.weight" in ids else next(k for k in ids if k.startswith("head"))]
    )
    assert len(set(blocks)) == 1
    skipped = model.no_weight_decay()
    assert skipped <= ids.keys()
    assert any(key.endswith("A_log") for key in skipped)


@each_family
def test_typos_raise(name: str) -> None:
    with pytest.raises(TypeError, match="drop_path_rat"):
        create(name, drop_path_rat=0.1)


@each_family
def test_stochastic_depth_grows_linearly(name: str) -> None:
    model = create(name, drop_path_rate=0.5)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.5)


@each_family
@pytest.mark.slow
def test_compiles_whole(name: str) -> None:
    model = copy.deepcopy(shared(name))
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True)(images()),
            model(images()),
            rtol=SAME_FUNCTION,
            atol=SAME_FUNCTION,
        )


@each_family
def test_exports_with_a_dynamic_batch(name: str) -> None:
    model = shared(name)
    exported = torch.export.export(
        model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},)
    )
    with torch.no_grad():
        torch.testing.assert_close(
            exported.module()(images(3, 3, 64, 64)),
            model(images(3, 3, 64, 64)),
            rtol=SAME_FUNCTION,
            atol=SAME_FUNCTION,
        )
