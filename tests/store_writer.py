"What each of two processes does to a store of tensors; apart, so that a new process imports little."

import torch

from spectral_nb.attention.stores import TensorStore


def write_many(folder):
    store = TensorStore(4000, folder, least_bytes=0)
    for k in range(60):
        store.put(("k", k % 7), (torch.full((100,), float(k % 7)),))
        store.prune()
        if (found := store.get(("k", k % 7))) is not None:
            assert (found[0] == k % 7).all()
