"""What the manual says about the VMCS, gathered from the files that hold its tables.

Constants for kernels are in `slots` (fields), `bits` (controls), `reasons` and `events`.
"""

from vtsim.vmcs.capabilities import FEATURES, MSR_NAMES, Capabilities, Feature
from vtsim.vmcs.controls import CONTROL, CONTROLS, WORDS, Control, ControlWord, describe_controls
from vtsim.vmcs.events import (
    ACTIVITY_STATES,
    EVENT_TYPES,
    EXCEPTIONS,
    INSTRUCTION_ERRORS,
    INTERRUPTIBILITY,
    describe_event,
)
from vtsim.vmcs.fields import (
    BY_ENCODING,
    BY_NAME,
    ENCODING_TO_SLOT,
    ENCODINGS,
    FIELDS,
    READ_ONLY,
    SLOT,
    WIDTH_MASK,
    Area,
    Field,
    Width,
    describe_fields,
)
from vtsim.vmcs.generations import GENERATIONS, Generation
from vtsim.vmcs.qualification import describe
from vtsim.vmcs.reasons import BY_NUMBER, REASON, REASON_COUNT, REASONS, Reason, reason_name

__all__ = [
    "ACTIVITY_STATES",
    "BY_ENCODING",
    "BY_NAME",
    "BY_NUMBER",
    "CONTROL",
    "CONTROLS",
    "ENCODINGS",
    "ENCODING_TO_SLOT",
    "EVENT_TYPES",
    "EXCEPTIONS",
    "FEATURES",
    "FIELDS",
    "GENERATIONS",
    "INSTRUCTION_ERRORS",
    "INTERRUPTIBILITY",
    "MSR_NAMES",
    "READ_ONLY",
    "REASON",
    "REASONS",
    "REASON_COUNT",
    "SLOT",
    "WIDTH_MASK",
    "WORDS",
    "Area",
    "Capabilities",
    "Control",
    "ControlWord",
    "Feature",
    "Field",
    "Generation",
    "Reason",
    "Width",
    "describe",
    "describe_controls",
    "describe_event",
    "describe_fields",
    "reason_name",
]
