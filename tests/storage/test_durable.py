"""Tensors in a file: readable by everybody, whole after a crash."""

import safetensors.torch
import torch

from sslvit.storage import durable


def test_every_dtype_is_read_back_by_the_reference_implementation(tmp_path):
    values = torch.arange(-6, 6).reshape(3, 4)
    tensors = {str(dtype): values.to(dtype) for dtype in durable.DTYPES}
    tensors |= {"transposed": torch.randn(4, 3).T, "scalar": torch.tensor(1.5), "empty": torch.zeros(2, 0, 3)}
    tensors |= {
        "shared": tensors["transposed"],
        "slice": torch.arange(10.0)[2:7:2],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    tensors['quotes " and \\ and ü and a\nline'] = torch.ones(1)
    durable.write(tmp_path / "file", durable.tensor_pieces(tensors))
    read = safetensors.torch.load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_tensor_file_is_byte_for_byte_that_of_the_reference_implementation(tmp_path):
    tensors = {f"blocks.{i}.weight": torch.randn(i, 3) for i in range(12)}
    durable.write(tmp_path / "ours", durable.tensor_pieces(tensors))
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
