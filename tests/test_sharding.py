import jax
import pytest

from regjax import sharding
from regjax.errors import InputError


def test_the_mesh_holds_every_device():
    mesh = sharding.make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.size == jax.device_count()
    assert dict(sharding.make_mesh(1, -1).shape)["fsdp"] == jax.device_count()


def test_specifications():
    mesh = sharding.make_mesh()
    assert sharding.replicated(mesh).spec == jax.P()
    assert sharding.by_row(mesh).spec == jax.P(("data", "fsdp"))
    assert sharding.by_row(mesh, axis=1).spec == jax.P(None, ("data", "fsdp"))


@pytest.mark.parametrize("sizes", [(4096, 1, 1), (-1, 4096, 1), (-1, -1, 1), (0, 1, 1), (-1, 0, 1)])
def test_sizes_that_do_not_make_up_the_devices_are_refused(sizes):
    named = f"data {sizes[0]}, fsdp {sizes[1]}, tensor {sizes[2]}"
    with pytest.raises(InputError, match=f"mesh of {named}: .* the number of devices"):
        sharding.make_mesh(*sizes)
