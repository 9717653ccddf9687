"""timm's model contract, over every model that this package registers."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import feature_extraction

from backbones.commands.bench.measure import relative_error
from backbones.layers import Mamba2Mixer, Scan, SelectiveSSM, scan_grid
from backbones.layers.rotary import RotaryEmbedding
from backbones.models import family_names
from backbones.patterns import ATROUS, HILBERT, REVERSE, SNAKE, ScanPattern
from tests.small_models import SMALLEST, blocks_of, create, create_small, images, is_plain, total
from tests.tolerances import AUTOCAST, SAME_FUNCTION

NAMES = sorted(name for module in family_names() for name in timm.list_models(module=module))
PROMISED = [
    "vim_tiny",
    "vim_small",
    "vim_base",
    "vim_tiny_stride8",
    "vim_small_stride8",
    "lbvim_tiny",
    "lbvim_300",
    "lbvim_small",
    "lbvim_528",
    "vmamba_tiny_s1l8",
    "vmamba_tiny_s2l5",
    "vmamba_small_s1l20",
    "vmamba_small_s2l15",
    "vmamba_base_s1l20",
    "vmamba_base_s2l15",
    "vanilla_vmamba_tiny",
    "vanilla_vmamba_small",
    "vanilla_vmamba_base",
    "vmamba_tiny",
    "vmamba_small",
    "vmamba_base",
    "msvmamba_nano",
    "msvmamba_micro",
    "msvmamba_tiny",
    "msvmambav3_tiny",
    "msvmambav3_small",
    "msvmambav3_base",
    "efficientvmamba_tiny",
    "efficientvmamba_small",
    "efficientvmamba_base",
    "groupmamba_tiny",
    "groupmamba_small",
    "groupmamba_base",
    "spatialmamba_tiny",
    "spatialmamba_small",
    "spatialmamba_base",
    "vssd_micro",
    "vssd_tiny",
    "vssd_small",
    "vssd_base",
    "localvim_tiny",
    "localvim_tiny_midcls",
    "localvim_tiny_unsearched",
    "localvim_small",
    "localvim_small_unsearched",
    "localvmamba_tiny",
    "localvmamba_small",
    "adventurer_tiny",
    "adventurer_small",
    "adventurer_base",
    "adventurer_base_patch8",
    "adventurer_large",
    "plainmamba_l1",
    "plainmamba_l2",
    "plainmamba_l3",
]


@pytest.fixture(scope="module", params=[x if x in SMALLEST else pytest.param(x, marks=pytest.mark.slow) for x in NAMES])
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Every registered model as it is registered, in eval mode; tests leave it as it is."""
    torch.manual_seed(0)
    return create(request.param).eval()


@pytest.fixture(scope="module", params=SMALLEST)
def name(request: pytest.FixtureRequest) -> str:
    """One model of every generation of every family."""
    return request.param


@pytest.fixture(scope="module")
def shallow(name: str) -> nn.Module:
    """It, narrow and shallow, in eval mode; tests leave it as it is."""
    torch.manual_seed(0)
    return create_small(name).eval()


def test_the_promised_names_are_registered() -> None:
    assert sorted(PROMISED) == NAMES


@torch.no_grad()
def test_forward_is_features_then_head(model: nn.Module) -> None:
    logits = model(images())
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    features = model.forward_features(images())
    assert features.shape[-1] == model.num_features
    torch.testing.assert_close(model.forward_head(features), logits)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)


@torch.no_grad()
def test_intermediates(model: nn.Module) -> None:
    plain = hasattr(model, "blocks")
    final, maps = model.forward_intermediates(images())
    torch.testing.assert_close(final, model.forward_features(images()))
    assert len(maps) == len(model.feature_info)
    for info, feature in zip(model.feature_info, maps, strict=True):
        overlap = model.pretrained_cfg["architecture"].endswith("_stride8")  # patches of 16 pixels: one position less
        side = 64 // info["reduction"] - overlap
        assert feature.shape == (2, info["num_chs"], side, side)
    rows = model.forward_intermediates(
        images(), indices=[-1], output_fmt="NLC" if plain else "NHWC", intermediates_only=True
    )
    torch.testing.assert_close(rows[0].flatten(1, -2), maps[-1].flatten(2).transpose(1, 2))
    early = model.forward_intermediates(images(), indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], maps[0])
    with pytest.raises(ValueError, match="output_fmt: got 'CHW'"):
        model.forward_intermediates(images(), output_fmt="CHW")


def test_parameters_are_grouped_by_depth(model: nn.Module) -> None:
    ids = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    first_block = "blocks.0." if hasattr(model, "blocks") else "stages.0.blocks.0."
    assert len({x for key, x in ids.items() if key.startswith(first_block)}) == 1
    assert len({x for key, x in ids.items() if key.startswith(("patch_embed.", "stem."))}) == 1
    assert all(ids[key] == max(ids.values()) for key in ids if key.startswith("head."))
    skipped = model.no_weight_decay()
    assert skipped <= ids.keys()
    assert any(key.endswith("A_log") for key in skipped)


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("group", [timm.models.group_parameters, timm.models.group_modules])
@pytest.mark.parametrize("hierarchy", [x for x in SMALLEST if not is_plain(x)])
def test_groups_of_a_hierarchy_follow_its_depth(hierarchy: str, group: Callable[..., dict], coarse: bool) -> None:
    """As in timm: what leads to a block belongs to it, a norm belongs to the block or stage before it."""
    model = create(hierarchy, device="meta")
    depths = [1 if coarse else len(stage.blocks) for stage in model.stages]
    first = [1 + sum(depths[:i]) for i in range(4)]  # the stem is 0
    expected: dict[str, int] = {"stem": 0, "norm": sum(depths), "head": sum(depths) + 1}
    for i, stage in enumerate(model.stages):
        expected |= {f"stages.{i}.blocks.{j}": first[i] + j * (not coarse) for j in range(len(stage.blocks))}
        expected |= {f"stages.{i}.norm": first[i] + depths[i] - 1, f"downsamples.{i}": first[min(i + 1, 3)]}
    found = group(model, model.group_matcher(coarse), reverse=True)
    parts = {name: [part for part in expected if f"{name}.".startswith(f"{part}.")] for name in found}
    assert found == {name: expected[part] for name, (part,) in parts.items()}


def _rows_in_turn(grid: torch.Tensor) -> torch.Tensor:
    even, odd = grid[::2].flatten(), grid[1::2].flatten()
    return torch.stack([even, nn.functional.pad(odd, (0, len(even) - len(odd)), value=-1)])


@pytest.mark.parametrize("pattern", [ATROUS, ScanPattern("rows_in_turn", 2, _rows_in_turn, pad_to=2)])
@pytest.mark.parametrize("size", [(1, 1), (1, 6), (4, 6), (5, 6), (4, 7), (5, 3)])
def test_each_order_may_project_only_what_it_visits(size: tuple[int, int], pattern: ScanPattern) -> None:
    """Orders that share the cells; projecting every cell for every order gives the same, gradients too."""
    torch.manual_seed(0)
    ssm = SelectiveSSM(3, d_state=2, dt_rank=1, num_orders=pattern.num_orders, dtype=torch.float64)
    x = torch.randn(2, *size, 3, dtype=torch.float64, requires_grad=True)
    whole = nn.functional.pad(x.flatten(1, 2), (0, 0, 0, 1))
    cells = size[0] * size[1]
    results = []
    given = []
    ssm.register_forward_pre_hook(lambda module, args: given.append(args[1]))
    for y in (
        scan_grid(ssm, x, Scan(pattern)).flatten(1, 2),
        ssm(whole, pattern.orders(*size, pad_index=cells))[:, :cells],
    ):
        grads = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y)).sum(), [x, *ssm.parameters()])
        results.append([y, *grads])
    torch.testing.assert_close(*results)
    assert given[0] is None  # the steps of each order, already in turn


def test_every_parameter_gets_a_gradient(name: str) -> None:
    model = create_small(name).train()
    total(model(images())).backward()
    broken = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert broken == []


def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    model = create_small(name, drop_path_rate=0.2).train()
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


def test_classifier_can_be_replaced_and_removed(shallow: nn.Module) -> None:
    model = copy.deepcopy(shallow)
    features = model.forward_features(images()[:1])
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.forward_head(features).shape == (1, 3)
    model.reset_classifier(0)
    assert model.forward_head(features).shape == (1, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape
    with pytest.raises(ValueError, match="global_pool: got 'mean'"):
        model.reset_classifier(0, "mean")


@torch.no_grad()
def test_built_without_classifier_and_pooling(name: str) -> None:
    model = create_small(name, num_classes=0, global_pool="").eval()
    assert model(images()).shape == model.forward_features(images()).shape


@torch.no_grad()
def test_grey_images(name: str) -> None:
    assert create_small(name, in_chans=1).eval()(images(1, 1, 64, 64)).shape == (1, 10)


@torch.no_grad()
def test_features_only(name: str) -> None:
    model = create_small(name, features_only=True, out_indices=[0, 1]).eval()
    whole = create_small(name).eval()
    whole.load_state_dict({**whole.state_dict(), **model.model.state_dict()})
    expected = whole.forward_intermediates(images(), indices=[0, 1], intermediates_only=True)
    for found, wanted, channels in zip(model(images()), expected, model.feature_info.channels(), strict=True):
        torch.testing.assert_close(found, wanted)
        assert found.shape[1] == channels


@torch.no_grad()
@pytest.mark.parametrize("order", [(1, 0), (-1, 0), (1, 1)])
@pytest.mark.parametrize("feature_cls", ["getter", "hook"])
def test_features_come_in_the_order_asked_for(name: str, feature_cls: str, order: tuple[int, int]) -> None:
    """Each under its own entry of ``feature_info``, where timm's getter sorts the maps alone."""
    if feature_cls == "hook" and order == (1, 1):
        return  # timm's hooks see a module once
    features = create_small(name, features_only=True, out_indices=order, feature_cls=feature_cls).eval()
    whole = create_small(name).eval()
    given = {key.removeprefix("body.").removeprefix("model."): x for key, x in features.state_dict().items()}
    whole.load_state_dict({**whole.state_dict(), **given})
    expected = [whole.forward_intermediates(images(), indices=[i], intermediates_only=True)[0] for i in order]
    found = features(images())
    assert features.feature_info.module_name() == [whole.feature_info[i]["module"] for i in order]
    assert features.feature_info.channels() == [x.shape[1] for x in expected]
    assert features.feature_info.reduction() == [64 // x.shape[2] for x in expected]
    for one, other in zip(found, expected, strict=True):
        if feature_cls == "getter":
            torch.testing.assert_close(one, other)
        elif not is_plain(name):  # of a plain model a hook sees tokens, the class token among them
            torch.testing.assert_close(one.permute(0, 3, 1, 2), other)
    several = whole.forward_intermediates(images(), indices=list(order), norm=True, stop_early=True)[1]
    for i, one in zip(order, several, strict=True):
        torch.testing.assert_close(one, whole.forward_intermediates(images(), indices=[i], norm=True)[1][0])


@torch.no_grad()
def test_pruning_keeps_what_is_asked_for(shallow: nn.Module) -> None:
    model = copy.deepcopy(shallow)
    expected = model.forward_intermediates(images(), indices=[1], intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in shallow.parameters())
    torch.testing.assert_close(model.forward_intermediates(images(), indices=[1], intermediates_only=True), expected)
    model(images())


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 96), (57, 83), (33, 71)])
def test_any_image_size(name: str, size: tuple[int, int]) -> None:
    model = create_small(name, **({"dynamic_img_size": True} if is_plain(name) else {})).eval()
    assert model(images(1, 3, *size)).isfinite().all()
    maps = model.forward_intermediates(images(1, 3, *size), intermediates_only=True)
    assert all(x.isfinite().all() for x in maps)


def test_images_that_do_not_fit_are_named(name: str, shallow: nn.Module) -> None:
    with pytest.raises(ValueError, match="x: got an image of 31 x 64 pixels"):
        shallow(images(1, 3, 31, 64))
    if is_plain(name):
        with pytest.raises(ValueError, match="expected at least one patch of 16"):
            create_small(name, dynamic_img_size=True, dynamic_img_pad=False)(images(1, 3, 64, 15))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(shallow: nn.Module, dtype: torch.dtype) -> None:
    expected = shallow(images())
    with torch.autocast("cpu", dtype):
        found = shallow(images())
        loud = shallow(100 * images())
    assert loud.isfinite().all()
    assert relative_error(found, expected) <= AUTOCAST[str(dtype).removeprefix("torch.")]


@torch.no_grad()
def test_weights_of_half_precision(shallow: nn.Module) -> None:
    expected = shallow(images())
    found = copy.deepcopy(shallow).to(torch.bfloat16)(images().bfloat16())
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) <= AUTOCAST["bfloat16"]


@pytest.mark.parametrize("autocast", [True, False])
def test_gradients_of_loud_images_in_half_precision(shallow: nn.Module, autocast: bool) -> None:
    model = copy.deepcopy(shallow) if autocast else copy.deepcopy(shallow).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(100 * images() if autocast else 100 * images().bfloat16())
    logits.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in model.parameters())


def test_device_and_dtype_of_construction(name: str) -> None:
    assert {p.device.type for p in create_small(name, device="meta").parameters()} == {"meta"}
    assert {p.dtype for p in create_small(name, dtype=torch.float64).parameters()} == {torch.float64}


@torch.no_grad()
def test_double_precision_agrees(shallow: nn.Module) -> None:
    exact = copy.deepcopy(shallow).double()(images()[:1].double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(shallow(images()[:1]).double(), exact, rtol=1e-4, atol=1e-4)


def test_typos_raise(name: str) -> None:
    with pytest.raises(TypeError, match="drop_path_rat"):
        create_small(name, drop_path_rat=0.1)


def difference(shallow: nn.Module, other: nn.Module) -> float:
    """How far two models with the same weights are apart, in double precision."""
    other.load_state_dict(shallow.state_dict())
    x = images().double()
    return (other.eval().double()(x) - copy.deepcopy(shallow).double()(x)).abs().max().item()


@torch.no_grad()
def test_another_pattern_changes_the_function_but_not_the_parameters(name: str, shallow: nn.Module) -> None:
    counts = [m.num_orders for m in shallow.modules() if isinstance(m, SelectiveSSM)]
    counts += [m.scan.pattern.num_orders for m in shallow.modules() if isinstance(m, Mamba2Mixer)]
    orders = max(counts, default=0)
    if not orders:  # a model without scans has no such argument
        with pytest.raises(TypeError, match="unexpected keyword argument 'pattern'"):
            create_small(name, pattern=REVERSE)
        return
    for pattern in (REVERSE, SNAKE, HILBERT):
        own = pattern == SNAKE and name.startswith("plainmamba")
        if pattern.num_orders == orders and name != "spatialmamba_tiny" and not own:
            assert difference(shallow, create_small(name, pattern=pattern)) > 1e-8
    odd = ScanPattern("odd", 7, lambda grid: grid.flatten().expand(7, -1))
    with pytest.raises(ValueError, match="pattern: got 'odd' with 7 orders, expected"):
        create_small(name, pattern=odd)


@torch.no_grad()
def test_a_local_window_changes_the_function(name: str, shallow: nn.Module) -> None:
    if not any(isinstance(m, SelectiveSSM | Mamba2Mixer) for m in shallow.modules()):
        with pytest.raises(TypeError, match="unexpected keyword argument 'local_window'"):
            create_small(name, local_window=3)
        return
    assert difference(shallow, create_small(name, local_window=3)) > 1e-8


# Tracing takes seconds a block, so one of every family is traced with as few as there are kinds.
ONE_OF_EACH = [
    pytest.param(x, marks=pytest.mark.slow)
    if x in ("lbvim_528", "vanilla_vmamba_tiny", "msvmambav3_tiny", "localvim_tiny_midcls", "plainmamba_l2")
    else x
    for x in SMALLEST
]


def create_minimal(name: str, **kwargs: object) -> nn.Module:
    """A narrow model with every kind of block once, in eval mode."""
    torch.compiler.reset()  # one process compiles a forward at most 8 times anew, and all models share one
    if name.startswith("adventurer"):
        return create_small(name, depth=2, flip_layers=(1,), **kwargs).eval()
    depth = {"depth": 2 if name.startswith("lbvim") else 1} if is_plain(name) else {"depths": (1, 1, 1, 1)}
    return create_small(name, **depth, **kwargs).eval()


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_compiles_whole(name: str) -> None:
    model = create_minimal(name)
    compiled = torch.compile(model, fullgraph=True)(images())
    torch.testing.assert_close(compiled, model(images()), rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_traces_whole(name: str) -> None:
    model = create_minimal(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images())
    torch.testing.assert_close(compiled, model(images()), rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_exports_with_a_dynamic_batch(name: str) -> None:
    model = create_minimal(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},)).module()
    three = images(3, 3, 64, 64)
    torch.testing.assert_close(exported(three), model(three), rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_exports_with_a_dynamic_batch_and_dynamic_sides(name: str) -> None:
    options = {"dynamic_img_size": True} if is_plain(name) else {}
    if name.startswith("lbvim"):
        options["local_window"] = 8  # left to itself it depends on the number of tokens
    model = create_minimal(name, **options)
    # From 160 pixels on no stage is one cell wide, a size that tracing treats as a case of its own.
    height, width = (32 * torch.export.Dim(side, min=5, max=9) for side in ("rows", "columns"))
    shapes = {0: torch.export.Dim("batch", min=2, max=64), 2: height, 3: width}
    exported = torch.export.export(model, (images(2, 3, 192, 160),), dynamic_shapes=(shapes,)).module()
    wide = images(3, 3, 160, 256)
    torch.testing.assert_close(exported(wide), model(wide), rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


class Doubled(nn.Module):
    """A wrapper, as adapters use them, whose output is twice the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def double(model: nn.Module, name: str, way: str) -> None:
    """Makes the linear layer ``name`` give twice its output."""
    parent, _, child = name.rpartition(".")
    linear = model.get_submodule(name)
    if way == "wrapped":
        setattr(model.get_submodule(parent), child, Doubled(linear))
    elif way == "hooked":
        linear.register_forward_hook(lambda module, args, output: 2 * output)
    elif way == "hooked before":
        linear.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    elif way == "parametrised":
        for parameter, _ in list(linear.named_parameters()):
            nn.utils.parametrize.register_parametrization(linear, parameter, Twice())
    elif way == "patched":
        forward = linear.forward
        linear.forward = lambda x: 2 * forward(x)
    else:
        for parameter in linear.parameters():
            parameter.mul_(2)


@torch.no_grad()
@pytest.mark.parametrize("way", ["wrapped", "hooked", "hooked before", "parametrised", "patched"])
def test_changed_linear_layers_act(name: str, shallow: nn.Module, way: str) -> None:
    """Every linear layer, doubled in some way, gives what doubling its parameters gives."""
    found, expected = copy.deepcopy(shallow), copy.deepcopy(shallow)
    linears = {key: m for key, m in shallow.named_modules() if isinstance(m, nn.Linear)}
    assert any(key.endswith("out_proj") for key in linears) or name == "groupmamba_tiny"
    for key, linear in linears.items():
        if way == "hooked before" and linear.bias is not None:  # twice the input is not twice the output
            continue
        double(found, key, way)
        double(expected, key, "weight")
    y = expected(images())
    if way != "hooked before" or any(x.bias is None for x in linears.values()):
        assert (y - shallow(images())).abs().max() > 1e-4
    torch.testing.assert_close(found(images()), y, rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


@torch.no_grad()
def test_hooks_fire_on_every_module(name: str, shallow: nn.Module) -> None:
    """On linear layers, convolutions, norms, blocks and stages alike, also those that are set globally."""
    model = copy.deepcopy(shallow)
    watched = {key for key, m in model.named_modules() if not isinstance(m, nn.ModuleList | RotaryEmbedding)}
    seen: set[str] = set()
    for key in watched:
        model.get_submodule(key).register_forward_hook(lambda module, args, output, key=key: seen.add(key))
    model(images())
    assert watched - seen == set()

    called: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: called.append(module))
    try:
        shallow(images())
    finally:
        handle.remove()
    assert {id(shallow.get_submodule(key)) for key in watched} <= {id(module) for module in called}


@torch.no_grad()
def test_feature_hooks_give_the_getters_maps(name: str) -> None:
    hooked = create_small(name, features_only=True, out_indices=[0, 1], feature_cls="hook").eval()
    getter = create_small(name, features_only=True, out_indices=[0, 1]).eval()
    given = {key.removeprefix("body."): x for key, x in hooked.state_dict().items()}
    getter.model.load_state_dict({key: given[key] for key in getter.model.state_dict()})
    for found, wanted in zip(hooked(images()), getter(images()), strict=True):
        if not is_plain(name):  # of a plain model a hook sees tokens, the class token among them
            torch.testing.assert_close(found.permute(0, 3, 1, 2), wanted)
        assert found.isfinite().all()


def test_checkpointing_computes_blocks_again(name: str) -> None:
    model = create_small(name).train()
    calls: list[nn.Module] = []
    blocks = blocks_of(model)
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: calls.append(module))
    for enable, times in ((False, 1), (True, 2)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        total(model(images())).backward()
        assert [sum(module is block for module in calls) for block in blocks] == [times] * len(blocks)


def test_training_gives_one_tensor(name: str) -> None:
    """timm's convention: only set_distilled_training(True) makes a second classifier's logits visible."""
    model = create_small(name).train()
    assert model(images()).shape == (2, 10)
    if hasattr(model, "set_distilled_training"):
        model.set_distilled_training()
        features = model.forward_features(images())
        first, second = model.forward_head(features)
        assert not torch.equal(first, second)
        assert model.eval()(images()).shape == (2, 10)
        model.train().set_distilled_training(False)
        torch.testing.assert_close(model.forward_head(features), (first + second) / 2)


@torch.no_grad()
def test_channels_last_changes_nothing(name: str, shallow: nn.Module) -> None:
    moved = copy.deepcopy(shallow).to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    torch.testing.assert_close(moved(x), shallow(images()), rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


def test_scripting_names_the_way_out(shallow: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"torch\.jit\.script.*ssm-backbones export"):
        torch.jit.script(nn.Sequential(shallow))


def test_pool_size_is_that_of_the_last_map(name: str) -> None:
    model = create_small(name, device="meta", **({"img_size": 224} if is_plain(name) else {}))
    size = model.default_cfg["pool_size"]
    assert model.default_cfg["input_size"] == (3, 224, 224)
    if is_plain(name):
        assert size is None  # tokens
    else:
        assert model.forward_features(torch.empty(1, 3, 224, 224, device="meta")).shape[1:3] == size


def traced(model: nn.Module) -> nn.Module:
    """What timm's tests make of a model: a feature extractor of its outputs, by timm's lists of what is not traced."""
    kwargs = {
        "leaf_modules": timm.models.get_notrace_modules(),
        "autowrap_functions": timm.models.get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train, evaluation = feature_extraction.get_graph_node_names(model, tracer_kwargs=kwargs)
    return feature_extraction.create_feature_extractor(
        model, train_return_nodes=train[-1:], eval_return_nodes=evaluation[-1:], tracer_kwargs=kwargs
    )


@torch.no_grad()
def test_timms_tracing_forward(shallow: nn.Module) -> None:
    (found,) = traced(shallow)(images()).values()
    assert torch.equal(found, shallow(images()))


def test_timms_tracing_backward(name: str) -> None:
    model = create_small(name).train()
    graph = traced(model)
    results = []
    for either in (graph, model):
        model.zero_grad()
        torch.manual_seed(0)
        outputs = either(images())
        (y,) = outputs.values() if isinstance(outputs, dict) else (outputs,)
        y.square().mean().backward()
        results.append([p.grad for p in model.parameters()])
    assert sum(p.numel() for p in graph.parameters()) == sum(p.numel() for p in model.parameters())
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


@torch.no_grad()
def test_torchvisions_feature_extractor_needs_no_lists(shallow: nn.Module) -> None:
    """Whole blocks, and what is inside them, by their names."""
    block = "blocks.1" if hasattr(shallow, "blocks") else "stages.2.blocks.0"
    name = f"{block}.mixer" if hasattr(shallow.get_submodule(block), "mixer") else block
    seen: dict[str, Tensor] = {}
    hooked = copy.deepcopy(shallow)
    for key in (block, name):
        hooked.get_submodule(key).register_forward_hook(lambda module, args, y, key=key: seen.update({key: y}))
    hooked(images())
    extractor = feature_extraction.create_feature_extractor(shallow, list(seen))
    for key, y in extractor(images()).items():
        assert torch.equal(y, seen[key])
    with pytest.raises(ValueError, match="x: got an image of 31 x 64 pixels"):
        extractor(images(1, 3, 31, 64))


def test_tracing_takes_one_image_size_of_a_plain_model() -> None:
    model = create_small("vim_tiny", dynamic_img_size=True)
    with pytest.raises(ValueError, match="dynamic_img_size: got True"):
        torch.fx.symbolic_trace(model)


def test_naive_reaches_every_operator(name: str) -> None:
    """Kernels refuse second derivatives; on naive, a product with the Hessian is what differences of gradients give."""
    model = create_small(name, scan_backend="naive").eval().double()
    x, direction = images(1, 3, 64, 64).double(), torch.randn(1, 3, 64, 64, dtype=torch.float64)

    def gradient(x: Tensor, create_graph: bool = False) -> Tensor:
        x = x.requires_grad_()
        return torch.autograd.grad(model(x).square().sum(), x, create_graph=create_graph)[0]

    (found,) = torch.autograd.grad(gradient(x, create_graph=True), x, direction)
    step = 1e-8  # short, as activations have kinks
    expected = (gradient(x.detach() + step * direction) - gradient(x.detach() - step * direction)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("backend", [None, "naive"])
def test_no_images_give_an_empty_result(name: str, backend: str | None) -> None:
    """As of timm's convolutional models: empty logits and maps, and gradients of zero."""
    model, none = create_small(name, scan_backend=backend).eval(), torch.empty(0, 3, 64, 64)
    features, maps = model.forward_intermediates(none)
    assert features.shape == (0, *model.forward_features(images()[:1]).shape[1:])
    whole = model.forward_intermediates(images()[:1], intermediates_only=True)
    assert [x.shape for x in maps] == [(0, *x.shape[1:]) for x in whole]
    logits = model.train()(none)
    assert logits.shape == (0, 10)
    logits.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
