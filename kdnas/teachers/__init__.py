"""Networks that teach, and where they come from."""

from kdnas.specs import face

__getattr__, __dir__ = face(
    __name__,
    {
        "Ensemble": "kdnas.teachers.combined",
        "Frozen": "kdnas.teachers.base",
        "Route": "kdnas.teachers.combined",
        "Streamed": "kdnas.teachers.combined",
        "Teacher": "kdnas.teachers.base",
        "export_teacher": "kdnas.teachers.export",
        "hf_teacher": "kdnas.teachers.hf",
        "load_teacher": "kdnas.teachers.load",
        "onnx_teacher": "kdnas.teachers.onnx",
        "own_teacher": "kdnas.teachers.zoo",
        "several_teachers": "kdnas.teachers.combined",
        "streamed_teacher": "kdnas.teachers.combined",
        "student_teacher": "kdnas.teachers.zoo",
        "zoo_teacher": "kdnas.teachers.zoo",
    },
)
