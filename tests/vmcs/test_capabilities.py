"""Capability MSRs decode as the manual says, and each generation is what recorded processors of it report.

SDM: "Discovering Support for VMX"; "Basic VMX Information"; "Reserved Controls and Default Settings".
SDM: "Miscellaneous Data"; "VMCS Enumeration".
"""

import json
from pathlib import Path

import pytest

from vtsim.base.errors import ConfigError, ModelError
from vtsim.cpu.profile import load_profile
from vtsim.platform.identity import cpuid_leaves
from vtsim.vmcs import bits
from vtsim.vmcs.capabilities import FEATURES, MISC, MSR_NAMES, VMCS_ENUM, Capabilities
from vtsim.vmcs.controls import ENTRY, EXIT, PIN, PRIMARY, SECONDARY, TERTIARY, VM_FUNCTION, WORDS
from vtsim.vmcs.fields import BY_NAME, FIELDS
from vtsim.vmcs.generations import GENERATIONS

DATA = Path(__file__).parent / "data"


def _capabilities(msrs):
    return Capabilities(msrs={int(msr, 16): int(value, 16) for msr, value in msrs.items()})


MODEL = json.loads((DATA / "skylake_x.json").read_text())
SKYLAKE_X = _capabilities(MODEL["msrs"])
RECORDED = {
    name: _capabilities(entry["msrs"]) for name, entry in json.loads((DATA / "recorded_msrs.json").read_text()).items()
}
SERVER_ONLY_BEFORE_SKYLAKE = {
    "APIC_REGISTER_VIRTUALIZATION", "ENABLE_PML", "PROCESS_POSTED_INTERRUPTS", "VIRTUAL_INTERRUPT_DELIVERY",
}  # fmt: skip


@pytest.mark.parametrize(
    "generation, cpu, lacking",
    [
        ("core2", "Xeon X5482", set()),
        ("sandy-bridge", "Core i7-3960X", set()),
        ("broadwell", "Core i7-5600U", SERVER_ONLY_BEFORE_SKYLAKE),
        ("skylake-sp", "Core i7-7800X", {"ENABLE_PML", "VMCS_SHADOWING", "EPTP_SWITCHING"}),
    ],
)
def test_a_generation_is_a_recorded_processor_plus_what_its_servers_add(generation, cpu, lacking):
    assert GENERATIONS[generation].features - RECORDED[cpu].features == lacking
    assert RECORDED[cpu].features <= GENERATIONS[generation].features


def test_the_first_generation_is_the_recorded_core_duo_with_intel_64():
    ours, recorded = GENERATIONS["p4-672"].capabilities(), RECORDED["Core Duo T2600"]

    assert ours.features - recorded.features == {
        *("CR8_LOAD_EXITING", "CR8_STORE_EXITING", "ENTRY_IA32E_MODE_GUEST", "EXIT_HOST_ADDRESS_SPACE_SIZE"),
    }
    assert recorded.features - ours.features == {"PHYSICAL_ADDRESSES_32_BIT"}


@pytest.mark.parametrize("msr", sorted(set(MSR_NAMES) - {VMCS_ENUM}))
def test_features_of_a_recorded_sandy_bridge_make_its_msrs_again(msr):
    made, recorded = GENERATIONS["sandy-bridge"].capabilities(), RECORDED["Core i7-3960X"]

    assert made.read(msr) == recorded.read(msr)


@pytest.mark.parametrize(
    "name, lacks, has",
    [
        ("p4-672", {"ACTIVATE_SECONDARY_CONTROLS", "ENABLE_EPT", "ENABLE_VPID", "USE_TPR_SHADOW"}, set()),
        ("core2", {"ENABLE_EPT", "ENABLE_VPID"}, {"USE_TPR_SHADOW", "VIRTUALIZE_APIC_ACCESSES"}),
        ("nehalem", {"UNRESTRICTED_GUEST", "EPT_1G_PAGES"}, {"ENABLE_EPT", "ENABLE_VPID"}),
        ("westmere", {"PAUSE_LOOP_EXITING"}, {"UNRESTRICTED_GUEST"}),
        ("sandy-bridge", {"ENABLE_VM_FUNCTIONS", "EPT_ACCESSED_DIRTY"}, {"PAUSE_LOOP_EXITING"}),
        ("haswell", {"ENABLE_PML"}, {"ENABLE_VM_FUNCTIONS", "VMCS_SHADOWING", "EPT_ACCESSED_DIRTY"}),
        ("broadwell", {"USE_TSC_SCALING"}, {"ENABLE_PML", "EPT_VIOLATION_VE"}),
        ("skylake-sp", {"IPI_VIRTUALIZATION"}, {"USE_TSC_SCALING", "MODE_BASED_EXECUTE_CONTROL"}),
        ("cascade-lake", {"IPI_VIRTUALIZATION"}, {"ENABLE_XSAVES_XRSTORS"}),
    ],
)
def test_a_generation_has_what_it_brought_and_not_what_came_later(name, lacks, has):
    features = GENERATIONS[name].features

    assert has <= features
    assert not lacks & features


@pytest.mark.parametrize("generation", GENERATIONS.values(), ids=lambda generation: generation.name)
def test_a_generation_supports_its_features_and_no_others(generation):
    assert generation.capabilities().features == generation.features


def test_true_controls_allow_zeros_that_the_default_msrs_do_not():
    old, new = GENERATIONS["core2"].capabilities(), GENERATIONS["nehalem"].capabilities()

    assert old.allowed0(PRIMARY) & bits.CR3_LOAD_EXITING
    assert not new.allowed0(PRIMARY) & bits.CR3_LOAD_EXITING
    assert (new.allowed0(PIN), new.allowed0(PRIMARY)) == (0x16, 0x0400_6172)
    assert (new.allowed0(EXIT), new.allowed0(ENTRY)) == (0x0003_6DFB, 0x0000_11FB)


def test_allowed_settings_are_the_halves_of_the_recorded_msrs():
    assert SKYLAKE_X.allowed1(PIN) == 0xFF
    assert SKYLAKE_X.allowed0(PRIMARY) == 0x0400_6172  # from 0x48E, since IA32_VMX_BASIC bit 55 is 1
    assert SKYLAKE_X.allowed1(SECONDARY) == 0x0257_7FFF
    assert SKYLAKE_X.allowed0(SECONDARY) == 0
    assert SKYLAKE_X.allowed1(VM_FUNCTION) == 1
    assert SKYLAKE_X.allowed1(TERTIARY) == 0


def test_adjusting_adds_what_must_be_1_and_removes_what_must_be_0():
    wanted = bits.HLT_EXITING | bits.ACTIVATE_TERTIARY_CONTROLS

    assert SKYLAKE_X.adjust(PRIMARY, wanted) == 0x0400_6172 | bits.HLT_EXITING


# IA32_VMX_BASIC 0xd810000000002b, IA32_VMX_MISC 0x600401e0, IA32_VMX_VMCS_ENUM 0x54
def test_a_recorded_processor_decodes_as_the_manual_says():
    assert (SKYLAKE_X.revision, SKYLAKE_X.vmcs_bytes, SKYLAKE_X.memory_type) == (0x2B, 4096, 6)
    assert SKYLAKE_X.supports("INS_OUTS_INFORMATION")
    assert not SKYLAKE_X.supports("DUAL_MONITOR")
    assert (SKYLAKE_X.preemption_timer_shift, SKYLAKE_X.cr3_targets) == (0, 4)
    assert (SKYLAKE_X.msr_list_entries, SKYLAKE_X.highest_index) == (512, 0x2A)
    assert SKYLAKE_X.hlat_prefix_bits == 0


def test_every_named_control_in_a_recorded_default_class_is_supported():
    assert SKYLAKE_X.missing(["CR3_LOAD_EXITING", "EXIT_SAVE_DEBUG_CONTROLS"]) == ()


def test_an_unrestricted_guest_may_run_without_paging_and_protection():
    assert SKYLAKE_X.cr0_fixed() == (0x8000_0021, 0xFFFF_FFFF)
    assert SKYLAKE_X.cr0_fixed(unrestricted_guest=True) == (0x20, 0xFFFF_FFFF)
    assert SKYLAKE_X.cr4_fixed() == (0x2000, 0x37_27FF)


def test_recorded_fields_are_those_the_features_call_for():
    """A model may keep a field without its feature; it may not lack one that a feature calls for."""
    supported = {int(encoding, 16) for encoding in MODEL["supported_field_encodings"]}
    expected = {field.encoding for field in BY_NAME.values() if SKYLAKE_X.has_field(field)}

    assert expected - supported == set()


def test_a_processor_without_ept_has_no_ept_pointer():
    capabilities = GENERATIONS["p4-672"].capabilities()

    assert not capabilities.has_field(BY_NAME["EPT_POINTER"])
    assert capabilities.has_field(BY_NAME["GUEST_RIP"])
    assert capabilities.missing(["HLT_EXITING", "ENABLE_EPT", "ENABLE_VPID"]) == ("ENABLE_EPT", "ENABLE_VPID")


def test_a_control_brings_the_control_that_activates_its_word():
    features = Capabilities.from_features(["EPTP_SWITCHING", "IPI_VIRTUALIZATION"]).features

    assert {
        *("EPTP_SWITCHING", "ENABLE_VM_FUNCTIONS", "ACTIVATE_SECONDARY_CONTROLS"),
        *("IPI_VIRTUALIZATION", "ACTIVATE_TERTIARY_CONTROLS"),
    } <= features


def test_reserved_ones_are_allowed_and_required_whatever_is_supported():
    capabilities = Capabilities.from_features([])

    for word in WORDS:
        assert capabilities.allowed0(word) == capabilities.allowed1(word) == word.default1


def test_chosen_numbers_stand_in_their_msrs():
    capabilities = Capabilities.from_features(
        ["ACTIVATE_PREEMPTION_TIMER"], revision=0x1234, preemption_timer_shift=5, cr4_fixed1=0x2_0000
    )

    assert capabilities.revision == 0x1234
    assert capabilities.preemption_timer_shift == 5
    assert capabilities.cr4_fixed() == (0x2000, 0x2_2000)
    assert capabilities.highest_index == BY_NAME["PREEMPTION_TIMER_VALUE"].index


def test_an_unknown_feature_is_the_users_mistake():
    with pytest.raises(ConfigError) as error:
        Capabilities.from_features(["ENABLE_EPTS"])

    assert str(error.value) == "unknown VMX feature 'ENABLE_EPTS'\n help: did you mean 'ENABLE_EPT'?"


def test_asking_for_an_unknown_feature_is_our_mistake():
    with pytest.raises(ModelError) as error:
        SKYLAKE_X.supports("EPT")

    assert str(error.value) == "there is no VMX feature 'EPT'"


def test_no_two_features_share_a_bit():
    assert len({(feature.msr, feature.bit) for feature in FEATURES.values()}) == len(FEATURES)
    assert {feature.msr for feature in FEATURES.values()} <= set(MSR_NAMES)
    assert MSR_NAMES[MISC] == "IA32_VMX_MISC"


def test_cpuid_says_whether_there_is_vmx():
    profile = load_profile("skx-4114")

    for vmx in (True, False):
        (leaf,) = (row for row in cpuid_leaves(profile, vmx=vmx) if row[0] == 1)
        assert leaf[4] >> 5 & 1 == vmx


def test_the_highest_index_of_a_field_is_enumerated():
    capabilities = GENERATIONS["skylake-sp"].capabilities()

    assert capabilities.highest_index == max(field.index for field in FIELDS if capabilities.has_field(field))
