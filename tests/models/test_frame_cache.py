"""The cache holds the last window - 1 committed frames in order, shows those of a call behind them, and does not grow."""

import torch

from ardiff import FrameKVCache


def call(cache, first, count):
    """Frame f has all keys f and all values -f; what the first layer sees."""
    frames = torch.arange(first, first + count, dtype=torch.float32)
    keys = frames[None, None, :, None, None].expand(1, 2, count, 3, 4)
    cache.reserve(count)
    return [cache.extend(layer, keys, -keys) for layer in range(2)]


def new_cache(window):
    return FrameKVCache(2, 1, 2, 3, 4, window, device=torch.device("cpu"), dtype=torch.float32)


def test_a_call_sees_the_last_frames_and_its_own():
    for window in (2, 3, 5):
        for commits in ([1] * 9, [2, 3, 4], [9], [1, 9, 1], [0, 1, 0, 2, 0, 0, 1]):
            cache, done = new_cache(window), 0
            for num_commit in commits:
                held = range(max(done - window + 1, 0), done)
                assert list(cache.frames()) == list(held)
                for keys, values in call(cache, done, num_commit + 2):
                    assert keys.shape == (1, 2, (len(held) + num_commit + 2) * 3, 4)
                    assert keys[0, 0, ::3, 0].tolist() == [*held, *range(done, done + num_commit + 2)]
                    assert torch.equal(values, -keys)
                cache.commit(num_commit)
                done += num_commit
                assert cache.num_committed == done


def test_memory_does_not_grow():
    cache = new_cache(window=4)
    call(cache, 0, 3)
    size, address = cache.nbytes, cache.storage.data_ptr()
    assert size == 2 * 2 * 1 * 2 * (4 - 1 + 3) * 3 * 4 * 4
    for frame in range(100):
        call(cache, frame, 3)
        cache.commit(1)
    assert cache.nbytes == size
    assert cache.storage.data_ptr() == address


def test_a_long_prompt_takes_its_room_only_once():
    cache = new_cache(window=4)
    call(cache, 0, 100)
    cache.commit(99)
    assert cache.nbytes <= new_cache(window=4).nbytes
    assert call(cache, 99, 1)[0][0][0, 0, ::3, 0].tolist() == [96, 97, 98, 99]


def test_what_is_not_committed_counts_for_no_later_call():
    cache = new_cache(window=4)
    call(cache, 7, 2)
    assert list(cache.frames()) == []
    assert call(cache, 0, 1)[0][0].shape[2] == 3
