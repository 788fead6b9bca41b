import sys
import warnings

import numpy as np
import pytest
import torch
import trimesh
from cloud_benchmarks import write_las
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from peft_modal.errors import DataError, MissingExtraError
from peft_modal_pointcloud.readers import SUFFIXES, read_cloud

MESHES = (".obj", ".off", ".ply", ".stl")
CLOUDS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 40), st.integers(3, 7)),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)
quick = settings(
    deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def box() -> trimesh.Trimesh:
    return trimesh.creation.box((2.0, 4.0, 6.0))


@quick
@given(
    values=CLOUDS, separator=st.sampled_from([",", ", ", " ", "\t", "   "]), ending=st.sampled_from([".txt", ".xyz"])
)
def test_text_comes_back_bit_for_bit(tmp_path, values, separator, ending):
    path = tmp_path / f"cloud{ending}"
    rows = [separator.join(np.format_float_scientific(v) for v in row) for row in values]
    path.write_text("# x y z\n\n" + "\n".join(rows) + "\n")
    assert torch.equal(read_cloud(path), torch.from_numpy(values[:, :3]))


@quick
@given(values=CLOUDS, kind=st.sampled_from(["f2", "f4", "f8", ">f4", "i4"]), order=st.sampled_from("CF"))
def test_arrays_come_back_bit_for_bit(tmp_path, values, kind, order):
    values = np.asarray(values.clip(-60000, 60000)).astype(kind, order=order)
    np.save(tmp_path / "cloud.npy", values)
    points = read_cloud(tmp_path / "cloud.npy")
    assert points.dtype == torch.float32
    assert torch.equal(points, torch.from_numpy(values[:, :3].astype(np.float32)))


@quick
@given(values=CLOUDS, encoding=st.sampled_from(["ascii", "binary"]))
def test_a_ply_without_faces_comes_back_as_its_vertices(tmp_path, values, encoding):
    path = tmp_path / "cloud.ply"
    path.write_bytes(trimesh.PointCloud(values[:, :3]).export(file_type="ply", encoding=encoding))
    tolerance = 0.0 if encoding == "binary" else 1e-5
    torch.testing.assert_close(read_cloud(path), torch.from_numpy(values[:, :3].copy()), atol=1e-5, rtol=tolerance)


@settings(quick, max_examples=120)
@given(content=st.binary(max_size=400), ending=st.sampled_from(SUFFIXES))
def test_garbage_ends_in_a_data_error_or_in_finite_points(tmp_path, content, ending):
    path = tmp_path / f"garbage{ending}"
    path.write_bytes(content)
    check_only_data_errors(path)


@settings(quick, max_examples=120)
@given(data=st.data(), ending=st.sampled_from(SUFFIXES))
def test_a_damaged_file_ends_in_a_data_error_or_in_finite_points(tmp_path, data, ending):
    path = tmp_path / f"damaged{ending}"
    write_sound_file(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    check_only_data_errors(path)


def write_sound_file(path) -> None:
    if path.suffix in MESHES:
        box().export(path)
    elif path.suffix in {".las", ".laz"}:
        write_las(path, np.arange(12.0).reshape(4, 3))
    elif path.suffix == ".npy":
        np.save(path, np.arange(12.0).reshape(4, 3))
    else:
        path.write_text("1,2,3\n4,5,6\n7,8,9\n")


def check_only_data_errors(path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            points = read_cloud(path, num_points=20)
        except DataError as error:
            message = str(error)
        else:
            assert points.shape[1] == 3
            assert points.isfinite().all()
            return
    assert str(path) in message


@pytest.mark.parametrize("ending", SUFFIXES)
def test_every_ending_is_read_in_either_case(tmp_path, ending):
    path = tmp_path / f"cloud{ending}"
    write_sound_file(path)
    path = path.rename(path.with_suffix(ending.upper()))
    assert read_cloud(path, num_points=3).shape == (3, 3)


@pytest.mark.parametrize("ending", MESHES)
def test_meshes_are_sampled_uniformly_over_their_surface(tmp_path, ending):
    box().export(tmp_path / f"box{ending}")
    points = read_cloud(tmp_path / f"box{ending}", num_points=4000, seed=1)
    assert points.shape == (4000, 3)
    scaled = points.abs() / torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(scaled.amax(1), torch.ones(4000))
    assert float((scaled[:, 0] > 0.99999).float().mean()) == pytest.approx(48 / 88, abs=0.04)


def test_the_seed_fixes_the_draw(tmp_path):
    box().export(tmp_path / "box.ply")
    np.save(tmp_path / "many.npy", np.arange(300.0).reshape(100, 3))
    for name in ("box.ply", "many.npy"):
        first = read_cloud(tmp_path / name, num_points=10, seed=4)
        assert torch.equal(first, read_cloud(tmp_path / name, num_points=10, seed=4))
        assert not torch.equal(first, read_cloud(tmp_path / name, num_points=10, seed=5))


def test_the_global_generator_of_numpy_is_left_alone(tmp_path):
    box().export(tmp_path / "box.ply")
    before = np.random.get_state()[1].tolist()  # noqa: NPY002  that is what is checked
    read_cloud(tmp_path / "box.ply", num_points=10)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_a_point_file_gives_all_points_or_a_part_in_its_order(tmp_path):
    np.save(tmp_path / "many.npy", np.arange(300.0).reshape(100, 3))
    path = tmp_path / "many.npy"
    assert len(read_cloud(path)) == 100
    assert len(read_cloud(path, num_points=200)) == 100
    part = read_cloud(path, num_points=30)[:, 0]
    assert len(part) == 30
    assert (part.diff() > 0).all()


def test_equal_vertices_of_a_point_file_are_all_kept(tmp_path):
    (tmp_path / "cloud.obj").write_text("v 0 0 0\nv 0 0 0\nv 1 0 0\n")
    assert len(read_cloud(tmp_path / "cloud.obj")) == 3


def test_the_parts_of_a_scene_are_sampled_together(tmp_path):
    parts = [trimesh.creation.box((1.0, 1.0, 1.0)), trimesh.creation.box((1.0, 1.0, 1.0)).apply_translation((9, 0, 0))]
    text = ""
    for i, part in enumerate(parts):
        text += f"o part{i}\n" + "".join(f"v {x} {y} {z}\n" for x, y, z in part.vertices)
        text += "".join("f " + " ".join(str(v + 1 + 8 * i) for v in face) + "\n" for face in part.faces)
    (tmp_path / "two.obj").write_text(text)
    points = read_cloud(tmp_path / "two.obj", num_points=1000)
    assert float((points[:, 0] > 5).float().mean()) == pytest.approx(0.5, abs=0.06)


def test_an_off_header_glued_to_its_counts_is_read(tmp_path):
    (tmp_path / "glued.off").write_text("OFF3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 2\n")
    assert read_cloud(tmp_path / "glued.off", num_points=50).shape == (50, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b"# only a header\n\n", "holds no points"),
        ("a.txt", b"x y z\n1 2 3\n", "cannot be read as .txt: could not convert string 'x'"),
        ("a.txt", b"1 2\n3 4\n", "at least 3 columns"),
        ("a.txt", b"1 2 3\n1 2\n", "cannot be read as .txt"),
        ("a.xyz", b"1 2 nan\n1 2 3\n", "1 of 2 points with NaN or infinite"),
        ("a.xyz", b"1 2 1e300\n", "NaN or infinite"),
        ("a.xyz", b"\xff\xfe\x00", "cannot be read as .xyz"),
        ("a.npy", b"not an array", "cannot be read as .npy"),
        ("a.stl", b"not a mesh", "holds no points"),
        ("a.ply", b"not a mesh", "cannot be read as .ply"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\n0 0 0\n0 0 0\n3 0 1 2\n", "faces of area 0"),
        ("a.off", b"OFF\n3 1 0\n0 0 0\nnan 0 0\n0 1 0\n3 0 1 2\n", "NaN or infinite"),
        ("a.las", b"not a scan", "does not begin as a LAS file does"),
        ("a.jpg", b"123", "not a point cloud file: expected one of .las"),
    ],
)
def test_a_file_that_cannot_serve_is_named_with_the_reason(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_cloud(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((4, 2)), r"shape \(4, 2\)"),
        (np.zeros((2, 4, 3)), r"shape \(2, 4, 3\)"),
        (np.zeros(3), r"shape \(3,\)"),
        (np.zeros((0, 3)), "no points|cannot be read"),
        (np.zeros((4, 3), dtype=complex), "complex128, expected numbers"),
        (np.array([["a", "b", "c"]]), "expected numbers"),
        (np.array([[{}, 1, 2]], dtype=object), "cannot be read as .npy"),
    ],
    ids=["narrow", "three-axes", "flat", "no-rows", "complex", "text", "pickle"],
)
def test_an_array_of_another_form_is_refused(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values, allow_pickle=True)
    with pytest.raises(DataError, match=message):
        read_cloud(tmp_path / "a.npy")


def test_an_archive_of_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros((4, 3)))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(DataError, match="archive of arrays"):
        read_cloud(tmp_path / "a.npy")


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    (tmp_path / "folder.ply").mkdir()
    for name in ("folder.ply", "missing.ply"):
        with pytest.raises(DataError, match="does not exist or is not a file"):
            read_cloud(tmp_path / name)


def test_without_trimesh_meshes_name_the_extra_and_text_still_reads(tmp_path, monkeypatch):
    box().export(tmp_path / "box.ply")
    (tmp_path / "a.txt").write_text("1 2 3\n")
    monkeypatch.setitem(sys.modules, "trimesh", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "peft-modal\[pointcloud\]"'):
        read_cloud(tmp_path / "box.ply")
    assert read_cloud(tmp_path / "a.txt").tolist() == [[1.0, 2.0, 3.0]]
