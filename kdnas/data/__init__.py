"""Images and labels: the parts of a data set, its sources, and their names on the command line."""

from kdnas.specs import face

__getattr__, __dir__ = face(
    __name__,
    {
        "Data": "kdnas.data.base",
        "FileImages": "kdnas.data.files",
        "Images": "kdnas.data.base",
        "TensorImages": "kdnas.data.base",
        "cifar10": "kdnas.data.cifar",
        "cifar100": "kdnas.data.cifar",
        "csv": "kdnas.data.sources",
        "digits": "kdnas.data.builtin",
        "from_dataset": "kdnas.data.datasets",
        "folder": "kdnas.data.folders",
        "hf": "kdnas.data.sources",
        "load_data": "kdnas.data.load",
        "npz": "kdnas.data.sources",
        "parquet": "kdnas.data.sources",
        "strong": "kdnas.data.load",
        "wds": "kdnas.data.sources",
    },
)
