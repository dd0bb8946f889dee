"""The daemon's load of weights and its look at them, against a real SGLang."""

import pytest

from grpo.test_weights_contract import *  # noqa: F403 - every test of it, run on this folder's server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
