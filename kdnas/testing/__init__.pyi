# Written by .ci/faces.py (`make format`).

from kdnas.testing.losses import LossContract as LossContract
