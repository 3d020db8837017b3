# Written by .ci/faces.py (`make format`).

from kdnas.teachers.base import Frozen as Frozen
from kdnas.teachers.base import Teacher as Teacher
from kdnas.teachers.combined import Ensemble as Ensemble
from kdnas.teachers.combined import Route as Route
from kdnas.teachers.combined import Streamed as Streamed
from kdnas.teachers.combined import several_teachers as several_teachers
from kdnas.teachers.combined import streamed_teacher as streamed_teacher
from kdnas.teachers.export import export_teacher as export_teacher
from kdnas.teachers.hf import hf_teacher as hf_teacher
from kdnas.teachers.load import load_teacher as load_teacher
from kdnas.teachers.onnx import onnx_teacher as onnx_teacher
from kdnas.teachers.zoo import own_teacher as own_teacher
from kdnas.teachers.zoo import student_teacher as student_teacher
from kdnas.teachers.zoo import zoo_teacher as zoo_teacher
