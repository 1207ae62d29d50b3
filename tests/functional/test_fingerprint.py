"""Features are told apart by a number for their bits."""

import torch

from performers.functional.fingerprint import fingerprint


def test_the_number_of_a_tensor_is_its_sum_over_words_and_odd_numbers_modulo_2_to_the_64():
    x = torch.randn(3, 7)
    words = x.flatten().view(torch.int32).tolist()
    total = sum(word * (2 * i + 1) * 0x9E3779B97F4A7C1 for i, word in enumerate(words))
    assert fingerprint("kind", (x, x)) == ("kind", *2 * [(total + 2**63) % 2**64 - 2**63])


def test_order_signs_and_single_bits_count():
    x = torch.randn(11)
    others = [x.flip(0), -x, torch.cat([x[:-1], torch.nextafter(x[-1:], x[:1])])]
    assert len({fingerprint("kind", (y,)) for y in (x, *others)}) == 4
    assert fingerprint("kind", (x,)) == fingerprint("kind", (x.clone(),))
    assert fingerprint("kind", (x,)) != fingerprint("other", (x,))


def test_what_learns_or_has_no_numbers_has_none():
    x = torch.randn(3)
    for part in (x.clone().requires_grad_(), x.to("meta"), torch.inference_mode()(x.clone)()):
        assert fingerprint("kind", (x, part)) is None
