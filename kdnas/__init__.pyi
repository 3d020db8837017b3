# Written by .ci/faces.py (`make format`).

from kdnas import data as data
from kdnas import distillers as distillers
from kdnas import losses as losses
from kdnas import scorers as scorers
from kdnas import searchers as searchers
from kdnas import spaces as spaces
from kdnas import teachers as teachers
from kdnas import testing as testing
from kdnas.costs.budget import Budget as Budget
from kdnas.data.load import load_data as load_data
from kdnas.jobs._run import Run as Run
from kdnas.jobs.commands import doctor as doctor
from kdnas.jobs.commands import export as export
from kdnas.jobs.commands import finals as finals
from kdnas.jobs.commands import fit as fit
from kdnas.jobs.commands import plan as plan
from kdnas.jobs.commands import prune as prune
from kdnas.jobs.commands import retrain as retrain
from kdnas.jobs.commands import run as run
from kdnas.jobs.commands import search as search
from kdnas.jobs.commands import train as train
from kdnas.jobs.commands import why as why
from kdnas.settings import Experiment as Experiment
from kdnas.settings import FitTeacher as FitTeacher
from kdnas.settings import Recipe as Recipe
from kdnas.specs import spec as spec
from kdnas.students.load import load_student as load_student
from kdnas.supernet import Supernet as Supernet
from kdnas.tables import load_space as load_space
from kdnas.teachers.load import load_teacher as load_teacher

__version__: str
