"""The former place of `kvtoolkit.formats.entry`."""

from kvtoolkit.formats.entry import *  # noqa: F403
