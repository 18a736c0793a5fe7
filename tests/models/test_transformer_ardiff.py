"""The denoiser is strictly causal with a window, and a cache changes nothing but the work."""

import pytest
import torch

from ardiff import ARDiffTransformerModel


NUM_FRAMES = 6


def inputs(generator, num_frames=NUM_FRAMES, batch_size=2, dtype=torch.float32):
    hidden_states = torch.randn(batch_size, num_frames, 4, 4, generator=generator, dtype=dtype)
    timestep = torch.randint(1000, (batch_size, num_frames), generator=generator).sort(dim=1).values
    return hidden_states, timestep


def build(window=16, depth=2, seed=3, causal=True):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ARDiffTransformerModel(
            num_tokens=4,
            in_channels=4,
            width=32,
            depth=depth,
            num_heads=2,
            window=window,
            class_names=["a", "b"],
            causal=causal,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("changed", range(NUM_FRAMES))
def test_a_later_frame_never_changes_an_earlier_one(tiny_transformer, generator, changed):
    hidden_states, timestep = inputs(generator)
    before = tiny_transformer(hidden_states, timestep)
    other_states, other_timestep = hidden_states.clone(), timestep.clone()
    other_states[:, changed] += 3.0
    other_timestep[:, changed] = (timestep[:, changed] + 500) % 1000
    after = tiny_transformer(other_states, other_timestep)
    assert torch.equal(after[:, :changed], before[:, :changed])
    for frame in range(changed, NUM_FRAMES):
        assert not torch.equal(after[:, frame], before[:, frame])


@torch.no_grad()
def test_one_block_sees_exactly_the_window(generator):
    model = build(window=3, depth=1)
    hidden_states, timestep = inputs(generator)
    before = model(hidden_states, timestep)
    hidden_states[:, 1] += 3.0
    changed = (model(hidden_states, timestep) != before).flatten(2).any(-1).any(0)
    assert changed.tolist() == [False, True, True, True, False, False]


@torch.no_grad()
def test_without_causality_a_frame_sees_both_ways_and_there_is_no_cache(generator):
    model = build(window=3, depth=1, causal=False)
    hidden_states, timestep = inputs(generator)
    before = model(hidden_states, timestep)
    hidden_states[:, 3] += 3.0
    changed = (model(hidden_states, timestep) != before).flatten(2).any(-1).any(0)
    assert changed.tolist() == [False, True, True, True, True, True]
    with pytest.raises(ValueError, match="`causal` must be True for a cache"):
        model.new_cache(1)


@torch.no_grad()
def test_only_lags_matter_not_positions(generator):
    """A frame whose past lies within reach looks like the same frame of a video that began later."""
    model = build(window=3).double()
    hidden_states, timestep = inputs(generator, num_frames=7, dtype=torch.float64)
    timestep[:] = 0
    late = model(hidden_states, timestep)
    early = model(hidden_states[:, 2:], timestep[:, 2:])
    # Two blocks of window 3 look back 4 frames: frame 6 sees nothing before frame 2.
    assert torch.allclose(late[:, 6], early[:, 4], atol=1e-12, rtol=0)
    assert not torch.allclose(late[:, 5], early[:, 3], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("window", [2, 3, 16])
@pytest.mark.parametrize("commits", [[1] * 7, [3, 1, 3], [7], [2, 5]])
def test_cached_equals_uncached(generator, window, commits):
    model = build(window=window).double()
    hidden_states, timestep = inputs(generator, num_frames=10, dtype=torch.float64)
    timestep[:, :7] = 0
    full = model(hidden_states, timestep, torch.tensor([0, 1]))
    cache = model.new_cache(batch_size=2)
    outputs = []
    for count in commits:
        part = slice(cache.num_committed, cache.num_committed + count)
        outputs.append(
            model(hidden_states[:, part], timestep[:, part], torch.tensor([0, 1]), cache=cache, num_commit=count)
        )
    outputs.append(model(hidden_states[:, 7:], timestep[:, 7:], torch.tensor([0, 1]), cache=cache))
    assert cache.num_committed == 7
    assert torch.allclose(torch.cat(outputs, dim=1), full, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_commit_with_active_frames_behind_it_is_one_evaluation(generator):
    model = build(window=4).double()
    hidden_states, timestep = inputs(generator, num_frames=5, dtype=torch.float64)
    timestep[:, :2] = 0
    cache = model.new_cache(batch_size=2)
    together = model(hidden_states, timestep, cache=cache, num_commit=2)
    assert torch.allclose(together, model(hidden_states, timestep), atol=1e-12, rtol=0)
    again = model(hidden_states[:, 2:], timestep[:, 2:], cache=cache)
    assert torch.allclose(again, together[:, 2:], atol=1e-12, rtol=0)


@torch.no_grad()
def test_timestep_and_class_reach_their_frame(tiny_transformer, generator):
    hidden_states, timestep = inputs(generator)
    null = torch.full((2,), tiny_transformer.null_class)
    without = tiny_transformer(hidden_states, timestep)
    assert torch.equal(tiny_transformer(hidden_states, timestep, null), without)
    assert not torch.equal(tiny_transformer(hidden_states, timestep, torch.tensor([0, 0])), without)


def test_every_parameter_learns(generator):
    """Also right after initialisation, after one step has opened the zero output layers."""
    model = ARDiffTransformerModel(num_tokens=4, in_channels=4, width=32, depth=2, num_heads=2, class_names=["a"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hidden_states, timestep = inputs(generator)
    for _ in range(2):
        optimizer.zero_grad()
        (model(hidden_states, timestep, torch.tensor([0, 1])) - 1.0).square().mean().backward()
        optimizer.step()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert silent == []


def test_save_and_load(tiny_transformer, generator, tmp_path):
    tiny_transformer.save_pretrained(tmp_path)
    loaded = ARDiffTransformerModel.from_pretrained(tmp_path)
    hidden_states, timestep = inputs(generator)
    with torch.no_grad():
        assert torch.equal(loaded(hidden_states, timestep), tiny_transformer(hidden_states, timestep))
    assert list(loaded.config.class_names) == ["balls", "clouds", "sunset"]
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".json"] == [".safetensors"]


def test_errors_name_what_came(tiny_transformer, generator):
    hidden_states, timestep = inputs(generator)
    with pytest.raises(ValueError, match=r"`hidden_states` must have shape .* \(2, 6, 4, 3\)"):
        tiny_transformer(hidden_states[..., :3], timestep)
    with pytest.raises(ValueError, match=r"`timestep` must have shape \(2, 6\) but has \(2, 5\)"):
        tiny_transformer(hidden_states, timestep[:, :5])
    with pytest.raises(ValueError, match="`num_commit` must be 0 without a `cache` but is 1"):
        tiny_transformer(hidden_states, timestep, num_commit=1)
    with pytest.raises(ValueError, match="`window` must be at least 2 but is 1"):
        ARDiffTransformerModel(window=1)
    with pytest.raises(ValueError, match="`width` must be a multiple of 4"):
        ARDiffTransformerModel(width=30, num_heads=4)
