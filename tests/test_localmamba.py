"""What LocalVim and LocalVMamba are made of, each part against its formula: directions, padding, BiAttn, rotation."""

import math
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.layers import SS2D, BiAttn, MambaMixer, RotaryEmbedding, Scan
from backbones.layers.rotary import rotate
from backbones.models import localvmamba
from backbones.ops import selective_scan
from backbones.patterns import ATROUS, MULTI_SCALE, directions, get_pattern
from backbones.weights import CheckpointError
from tests.tolerances import SAME_FUNCTION

SIZES = [(14, 14), (4, 6), (3, 5), (1, 9), (8, 3), (1, 1)]


def walk(name: str, height: int, width: int) -> list[int]:
    """Cells of a direction, -1 outside of the grid, by nested loops."""
    name, _, flip = name.partition("_")
    if name == "v":
        cells = [i * width + j for j in range(width) for i in range(height)]
    else:
        side = int(name[1:] or 1)
        cells = [
            i * width + j if i < height and j < width else -1
            for top in range(0, height, side)
            for left in range(0, width, side)
            for i in range(top, top + side)
            for j in range(left, left + side)
        ]
    return cells[::-1] if flip else cells


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "names", [("h", "v_flip", "w7", "w7_flip"), ("w2", "w2_flip", "v", "h_flip"), ("v", "w3", "w2")]
)
def test_directions_are_walks_with_the_shorter_ones_filled_up(names: tuple[str, ...], size: tuple[int, int]) -> None:
    pattern = directions(*names)
    expected = [walk(name, *size) for name in names]
    steps = max(map(len, expected))
    assert pattern.orders(*size).tolist() == [cells + [-1] * (steps - len(cells)) for cells in expected]
    assert pattern.padded(*size) == any(-1 in cells for cells in expected)
    assert pattern.visits_each_cell_once(*size)


def test_directions_are_one_pattern_wherever_they_are_named() -> None:
    pattern = directions("h", "v_flip")
    assert get_pattern("h v_flip") is directions("h", "v_flip") is pattern
    table = pickle.loads(pickle.dumps(pattern)).orders(3, 4)
    assert torch.equal(table, pattern.orders(3, 4))
    assert not ATROUS.visits_each_cell_once(4, 4)
    assert not MULTI_SCALE.visits_each_cell_once(4, 4)
    for names, message in ((["x"], "names: got direction 'x', expected"), (["w0"], "'w0'"), ([], "at least one")):
        with pytest.raises(ValueError, match=message):
            directions(*names)
    with pytest.raises(ValueError, match="unknown scan pattern 'h x'"):
        get_pattern("h x")


def one_direction(mixer: MambaMixer, k: int, x: Tensor, cells: list[int], token: int | None) -> Tensor:
    """What direction k makes of tokens x (b, l, c): zeros are put into padded slots, and everything runs over them."""
    place = {cell: cell + (token is not None and cell >= token) for cell in cells}
    read = [-1 if cell < 0 else place[cell] for cell in cells]
    if token is not None:
        read.insert(token, token)
    sequence = torch.stack([x[:, i] if i >= 0 else torch.zeros_like(x[:, 0]) for i in read], dim=2)
    weight, bias, ssm = mixer.conv_weight[k], mixer.conv_bias[k], mixer.ssm
    taps = weight.shape[1]
    u = F.silu(F.conv1d(F.pad(sequence, (taps - 1, 0)), weight[:, None], bias, groups=len(weight))).transpose(1, 2)
    dt, B, C = (u @ ssm.x_proj_weight[k].t()).split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
    delta = (dt @ ssm.dt_proj_weight[k].t()).unsqueeze(2)
    A, B, C = ssm.A[k : k + 1], B.unsqueeze(2), C.unsqueeze(2)
    bias = ssm.dt_proj_bias[k : k + 1]
    y = selective_scan(u, delta, A, B, C, ssm.D[k : k + 1], delta_bias=bias, backend="naive")[:, :]
    out = torch.zeros_like(x)
    for step, i in enumerate(read):
        if i >= 0:
            out[:, i] = y[:, step]
    return out


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("size", [(14, 14), (3, 5), (8, 3)])
def test_padded_slots_are_steps_of_their_own(
    size: tuple[int, int], class_token: bool, merged: bool, backend: str
) -> None:
    names = ("h", "v_flip", "w2", "w7_flip")
    scan = Scan(directions(*names), backend="naive")
    mixer = MambaMixer(8, scan=scan, d_state=3, merge=BiAttn if merged else None, dtype=torch.float64)
    cells = size[0] * size[1]
    x = torch.randn(2, cells + class_token, 8, dtype=torch.float64)
    inner, z = mixer.in_proj(x).chunk(2, dim=-1)
    token = cells // 2 if class_token else None
    outputs = [one_direction(mixer, k, inner, walk(name, *size), token) for k, name in enumerate(names)]
    gated = torch.stack([y * F.silu(z) for y in outputs], dim=2)
    expected = mixer.out_proj(mixer.merge(gated) if merged else gated.mean(2))
    torch.testing.assert_close(mixer(x, size), expected)
    mixer.ssm.backend = backend
    torch.testing.assert_close(mixer.float()(x.float(), size), expected.float(), rtol=1e-4, atol=SAME_FUNCTION)


def test_patterns_that_leave_cells_out_are_refused() -> None:
    mixer = MambaMixer(8, scan=Scan(ATROUS))
    with pytest.raises(ValueError, match="pattern: 'atrous' does not visit each cell of a 4 x 5 grid once"):
        mixer(torch.randn(1, 20, 8), (4, 5))


def test_bi_attn() -> None:
    gate = BiAttn(16, dtype=torch.float64)
    y = torch.randn(2, 5, 3, 16, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(2, 5, 16, dtype=torch.float64)
    for k in range(3):
        mean = F.layer_norm(y[:, :, k], (16,), gate.norm.weight, gate.norm.bias, 1e-5).mean(1)
        hidden = F.gelu(F.linear(mean, gate.global_reduce.weight, gate.global_reduce.bias))
        selected = F.linear(hidden, gate.channel_select.weight, gate.channel_select.bias)
        expected = expected + y[:, :, k] * torch.sigmoid(selected)[:, None]
    found = gate(y)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    leaves = [y, *gate.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), leaves), torch.autograd.grad((expected * weights).sum(), leaves)
    )


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (3, 5)])
def test_rotation_turns_pairs_of_channels_by_row_and_column(grid: tuple[int, int]) -> None:
    dim = 16
    rope = RotaryEmbedding(dim, grid, dtype=torch.float64)
    x = torch.randn(2, grid[0] * grid[1], dim, dtype=torch.float64)
    found = torch.view_as_complex(rotate(x, *rope.tables(grid, same=True)).unflatten(-1, (-1, 2)))
    given = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    for i in range(grid[0]):
        for j in range(grid[1]):
            for pair in range(dim // 2):
                place, side = (i, grid[0]) if pair < dim // 4 else (j, grid[1])
                angle = place / side * 14 * 10000 ** (-2 * (pair % (dim // 4)) / (dim / 2))
                turn = complex(math.cos(angle), math.sin(angle))
                torch.testing.assert_close(found[:, i * grid[1] + j, pair], given[:, i * grid[1] + j, pair] * turn)
    with pytest.raises(ValueError, match="dim: got 6, expected a multiple of 4"):
        RotaryEmbedding(6, grid)


def turned(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The patches x (b, l, d) of a grid, channels in pairs as complex numbers, turned as EVA-02 states it."""
    rows, columns = torch.meshgrid(*(torch.arange(side).double() * 14 / side for side in grid), indexing="ij")
    pairs = torch.arange(x.shape[-1] // 4).double()
    frequencies = 10000 ** (-2 * pairs / (x.shape[-1] / 2))
    angles = torch.cat([place.flatten()[:, None] * frequencies for place in (rows, columns)], dim=1)
    complex_x = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(complex_x * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@torch.no_grad()
@pytest.mark.parametrize("class_token", [True, False])
def test_the_stream_is_turned_before_every_block_and_a_class_token_never(class_token: bool) -> None:
    """Of Vim, whose dense models of the authors use it. There is no recording of them: this is their formula.

    They turn what a block adds and the residual stream, each for itself: together the sum of both.
    """
    pool = {} if class_token else {"class_token": False, "global_pool": "avg"}
    model = timm.create_model("vim_tiny", img_size=48, depth=3, rope=True, **pool).eval().double()
    model.rope = RotaryEmbedding(192, (3, 3), dtype=torch.float64)  # the model's own was made in single precision
    image = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    x, grid = model.patch_embed(image), model.grid_size
    if class_token:
        x = torch.cat([x[:, :4], model.cls_token.expand(2, -1, -1), x[:, 4:]], dim=1)
    x = x + model.pos_embed
    branch, stream = x, torch.zeros_like(x)
    for block in model.blocks:
        for part in (branch, stream):
            if class_token:
                patches = turned(torch.cat([part[:, :4], part[:, 5:]], dim=1), grid)
                part.copy_(torch.cat([patches[:, :4], part[:, 4:5], patches[:, 4:]], dim=1))
            else:
                part.copy_(turned(part, grid))
        stream = branch + stream
        branch = block.mixer(block.norm(stream), grid)
    torch.testing.assert_close(model.forward_features(image), model.norm(branch + stream))
    maps = model.forward_intermediates(image, indices=[2], norm=True, intermediates_only=True)
    expected = model.norm(branch + stream)
    expected = model._split_class_token(expected)[0] if class_token else expected
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), expected)


@pytest.mark.parametrize("name", ["localvim_tiny", "vim_tiny"])
def test_rotary_tables_load_at_other_sizes(name: str) -> None:
    """Tables of the file are resampled, as the authors' dense models do; without tables they follow the formula."""
    small, large = (timm.create_model(name, img_size=size, depth=1, rope=True) for size in (64, 96))
    small.rope.freqs_cos.normal_()
    weights = small.state_dict()
    loaded = timm.create_model(
        name, True, pretrained_cfg_overlay={"state_dict": weights}, img_size=96, depth=1, rope=True
    )
    maps = small.rope.freqs_cos.t().unflatten(1, (4, 4))[None]
    expected = F.interpolate(maps, size=(6, 6), mode="bicubic", align_corners=False).flatten(2)[0].t()
    torch.testing.assert_close(loaded.rope.freqs_cos, expected)
    bare = {key: x for key, x in weights.items() if not key.startswith("rope.")}
    overlay = {"state_dict": bare}
    loaded = timm.create_model(name, True, pretrained_cfg_overlay=overlay, img_size=96, depth=1, rope=True)
    assert torch.equal(loaded.rope.freqs_cos, large.rope.freqs_cos)


def test_tables_that_a_model_cannot_use() -> None:
    """Vim leaves those of its older files out, which its released models do not use; LocalVim's models need theirs."""
    weights = timm.create_model("vim_tiny", depth=1, rope=True).state_dict()
    overlay = {"state_dict": weights}
    assert not timm.create_model("vim_tiny", True, pretrained_cfg_overlay=overlay, depth=1).rope
    overlay = {"state_dict": timm.create_model("localvim_tiny", depth=1).state_dict()}
    with pytest.raises(CheckpointError, match=r"unknown: rope\.freqs_cos, rope\.freqs_sin"):
        timm.create_model("localvim_tiny", True, pretrained_cfg_overlay=overlay, depth=1, rope=False)


@pytest.mark.parametrize("size", [(14, 14), (3, 5), (8, 3)])
def test_padded_slots_of_a_map_read_zeros(size: tuple[int, int], backend: str) -> None:
    names = ("h", "v_flip", "w2", "w7_flip")
    mixer = SS2D(8, scan=Scan(directions(*names), backend="naive"), d_state=3, merge=BiAttn, dtype=torch.float64)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    inner, z = mixer.in_proj(x).chunk(2, dim=-1)
    u, ssm = mixer.conv2d(inner).flatten(1, 2), mixer.ssm
    outputs = []
    for k, name in enumerate(names):
        cells = walk(name, *size)
        steps = torch.stack([u[:, i] if i >= 0 else torch.zeros_like(u[:, 0]) for i in cells], dim=1)
        dt, B, C = (steps @ ssm.x_proj_weight[k].t()).split([ssm.dt_rank, ssm.d_state, ssm.d_state], dim=-1)
        given = (dt @ ssm.dt_proj_weight[k].t(), ssm.A[k : k + 1], B, C)
        delta, A, B, C = (value if value.shape[0] == 1 else value.unsqueeze(2) for value in given)
        own = {"delta_bias": ssm.dt_proj_bias[k : k + 1], "backend": "naive"}
        y = selective_scan(steps, delta, A, B, C, ssm.D[k : k + 1], **own)
        outputs.append(torch.stack([y[:, cells.index(i)] for i in range(u.shape[1])], dim=1))
    merged = mixer.merge(torch.stack(outputs, dim=2)).unflatten(1, size)
    expected = mixer.out_proj(mixer.out_norm(merged) * F.silu(z))
    torch.testing.assert_close(mixer(x), expected)
    mixer.ssm.backend = backend
    torch.testing.assert_close(mixer.float()(x.float()), expected.float(), rtol=1e-4, atol=SAME_FUNCTION)


def test_blocks_of_a_pyramid_use_their_lists_through_the_stages() -> None:
    model = timm.create_model("localvmamba_small", device="meta")
    found = [block.mixer.scan.pattern.name.split() for stage in model.stages for block in stage.blocks]
    assert found == list(localvmamba.SMALL)
    model = timm.create_model("localvmamba_tiny", depths=(1, 1, 2, 1), directions=localvmamba.TINY[:2], device="meta")
    found = [block.mixer.scan.pattern.name.split() for stage in model.stages for block in stage.blocks]
    assert found == [localvmamba.TINY[i] for i in (0, 1, 0, 1, 0)]


def test_layers_use_their_lists_in_turn_and_a_pattern_stands_in_for_all() -> None:
    lists = [["h", "h_flip", "w2", "w2_flip"], ["v", "v_flip", "w7", "w7_flip"]]
    model = timm.create_model("localvim_tiny", depth=3, directions=lists, device="meta")
    expected = [directions(*lists[i]) for i in (0, 1, 0)]
    assert [block.mixer.scan.pattern for block in model.blocks] == expected
    model = timm.create_model("localvim_tiny", depth=3, pattern="cross", device="meta")
    assert {block.mixer.scan.pattern.name for block in model.blocks} == {"cross"}
    with pytest.raises(ValueError, match="names: got direction 'diagonal'"):
        timm.create_model("localvim_tiny", directions=[["h", "diagonal"]])
