"""What a step of a demonstration shows, and what should be done in it."""

import numpy as np
import torch

from theia.policies.action_heads import ChunkHead, MLPHead
from theia.policies.demonstrated import Demonstrations, batches, history
from theia.probing.frame_tokens import FrameTokens

CPU = torch.device("cpu")


def test_the_first_frame_of_an_episode_stands_for_those_before_it():
    expected = [[0, 0, 0], [0, 0, 1], [0, 1, 2], [3, 3, 3], [3, 3, 4]]
    np.testing.assert_array_equal(history([3, 2]), expected)


def test_steps_are_divided_into_batches_of_256_and_none_is_alone():
    assert [len(part) for part in batches(np.arange(600), 256)] == [256, 256, 88]
    assert [len(part) for part in batches(np.arange(513), 256)] == [256, 257]
    assert [len(part) for part in batches(np.arange(3), 256)] == [3]


def test_a_step_is_given_the_frames_before_it_within_its_episode():
    rng = np.random.default_rng(0)
    shown = rng.normal(size=(130 + 4, 36, 4)).astype(np.float16)
    kept = FrameTokens(shown, (6, 6), np.zeros(4), np.ones(4), np.eye(4))
    data = Demonstrations.of(
        kept, rng.normal(size=(len(shown), 2)).astype(np.float32), np.zeros((len(shown), 2), np.float32), [130, 4]
    )
    head = MLPHead(4, (6, 6), 2, 2)
    frames, known = data.batch(head, np.array([0, 5, 130]), CPU)
    tokens = torch.from_numpy(shown.astype(np.float32))
    maps = head.look(tokens, (6, 6))
    assert torch.equal(frames[0], maps[[0, 0, 0]])
    assert torch.equal(frames[1], maps[[3, 4, 5]])
    assert torch.equal(frames[2], maps[[130, 130, 130]])
    assert torch.equal(known, torch.from_numpy(data.known[[0, 5, 130]]))


def test_after_the_end_of_an_episode_no_action_counts():
    data = Demonstrations.of(None, np.zeros((5, 1), np.float32), np.arange(5, dtype=np.float32)[:, None], [3, 2])
    head = ChunkHead(0, (1, 1), 1, 1, chunk=3)
    actions, counted = data.wanted(head, np.array([0, 1, 2, 3]), CPU)
    assert actions[..., 0].tolist() == [[0, 1, 2], [1, 2, 2], [2, 2, 2], [3, 4, 4]]
    assert counted.tolist() == [[True] * 3, [True, True, False], [True, False, False], [True, True, False]]
