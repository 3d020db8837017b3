# Written by .ci/faces.py (`make format`).

from kdnas.data.base import Data as Data
from kdnas.data.base import Images as Images
from kdnas.data.base import TensorImages as TensorImages
from kdnas.data.builtin import digits as digits
from kdnas.data.cifar import cifar10 as cifar10
from kdnas.data.cifar import cifar100 as cifar100
from kdnas.data.datasets import from_dataset as from_dataset
from kdnas.data.files import FileImages as FileImages
from kdnas.data.folders import folder as folder
from kdnas.data.load import load_data as load_data
from kdnas.data.load import strong as strong
from kdnas.data.sources import csv as csv
from kdnas.data.sources import hf as hf
from kdnas.data.sources import npz as npz
from kdnas.data.sources import parquet as parquet
from kdnas.data.sources import wds as wds
