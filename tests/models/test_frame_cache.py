"""The ring holds the last window - 1 frames, each in its slot, and does not grow."""

import torch

from ardiff import FrameKVCache


def fill(cache, first, count):
    """Frame f has all keys f and all values -f."""
    frames = torch.arange(first, first + count, dtype=torch.float32)
    keys = frames[None, None, :, None, None].expand(1, 2, count, 3, 4)
    for layer in range(2):
        cache.store(layer, keys, -keys)
    cache.advance(count)


def new_cache(window):
    return FrameKVCache(2, 1, 2, 3, 4, window, device=torch.device("cpu"), dtype=torch.float32)


def test_holds_the_last_frames_in_slot_order():
    for window in (2, 3, 5):
        for counts in ([1] * 9, [2, 3, 4], [9]):
            cache = new_cache(window)
            for count in counts:
                fill(cache, cache.num_committed, count)
                kept = min(cache.num_committed, window - 1)
                assert sorted(cache.frames()) == list(range(cache.num_committed - kept, cache.num_committed))
                for layer in range(2):
                    keys, values = cache.get(layer)
                    assert keys.shape == (1, 2, kept * 3, 4)
                    assert keys[0, 0, ::3, 0].tolist() == list(cache.frames())
                    assert torch.equal(values, -keys)


def test_memory_does_not_grow():
    cache = new_cache(window=4)
    size = cache.nbytes
    fill(cache, 0, 1)
    address = cache.storage.data_ptr()
    fill(cache, 1, 100)
    assert cache.nbytes == size == 2 * 2 * 1 * 2 * 3 * 3 * 4 * 4
    assert cache.storage.data_ptr() == address


def test_stored_frames_show_only_after_advance():
    cache = new_cache(window=4)
    cache.store(0, torch.ones(1, 2, 1, 3, 4), torch.ones(1, 2, 1, 3, 4))
    assert cache.frames() == ()
    assert cache.get(0)[0].shape[2] == 0
