"""What the tests of templates share."""

import pytest

from opsd.common import templates
from opsd.common.workers import Workers


@pytest.fixture(scope="module")
def short():
    """Workers with a third of the time, so that the bombs cost less here."""
    with pytest.MonkeyPatch.context() as patch:
        workers = Workers("opsd.common.template_worker", seconds=0.3, memory=templates.MEMORY)
        patch.setattr(templates, "_WORKERS", workers)
        yield workers
        workers.close()
