"""Whether arrays may be in parts on several devices."""

import jax

from mora_jax._arrays import mesh as _mesh
from mora_jax._arrays.mesh import may_be_sharded


def test_one_device_is_not_sharded():
    assert jax.device_count() == 1
    assert not may_be_sharded()


def test_a_mesh_tells_whether_arrays_are_local(monkeypatch):
    monkeypatch.setattr(_mesh.jax, "device_count", lambda: 4)
    assert may_be_sharded()
    kinds = jax.sharding.AxisType
    for kind, sharded in ((kinds.Auto, True), (kinds.Explicit, True), (kinds.Manual, False)):
        mesh = jax.sharding.AbstractMesh((4,), ("d",), axis_types=(kind,))
        with jax.sharding.use_abstract_mesh(mesh):
            assert may_be_sharded() == sharded
