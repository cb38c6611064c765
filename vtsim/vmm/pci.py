"""Device models as far as a guest identifies them: what their configuration space says, by name.

A kernel finds its hardware by reading configuration space through the ports 0CF8H (address) and 0CFCH (data). A machine
has the devices that it lists, from device 1 of bus 0 on, each with function 0; a VM those that its hypervisor shows.

Not modelled: what devices do, their base address registers and interrupts, functions other than 0, bridges, other
buses; accesses to the data port that are not 32 bits wide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from attrs import frozen

# fmt: off
ADDRESS_PORT, DATA_PORT = 0xCF8, 0xCFC
ENABLE: Final = 1 << 31
WINDOW_KEY: Final = 1 << 40     # set in a configuration address where it stands in a table of ports
IDS, CLASS, SUBSYSTEM = 0x00, 0x08, 0x2C
DEVICE_LIMIT: Final = 16
NOTHING: Final = 0xFFFF_FFFF
PCI_IDS: Final = "PCI ID Repository (pci.ids), 2024"


@frozen
class Model:
    """What the configuration space of a device says. `revision` is of the device that the source shows."""

    title: str
    vendor: int
    device: int
    class_code: int
    revision: int
    subsystem: int
    source: str


MODELS: Final = {
    # name            title                                       vendor  device  class     rev   subsystem
    "vga":            Model("VGA controller (Bochs display)",    0x1234, 0x1111, 0x030000, 0x02, 0x1100_1AF4,
                      "QEMU: Standard VGA, and " + PCI_IDS),
    "virtualbox-vga": Model("VirtualBox graphics adapter",       0x80EE, 0xBEEF, 0x030000, 0x00, 0x0000_0000, PCI_IDS),
    "pro-1000":       Model("Intel PRO/1000 MT Desktop (82540EM)",     0x8086, 0x100E, 0x020000, 0x02, 0x001E_8086,
                      "Intel: PCI/PCI-X Family of Gigabit Ethernet Controllers, and " + PCI_IDS),
    "piix3-ide":      Model("Intel 82371SB PIIX3 IDE",           0x8086, 0x7010, 0x010180, 0x00, 0x0000_0000, PCI_IDS),
    "piix4-ide":      Model("Intel 82371AB PIIX4 IDE",           0x8086, 0x7111, 0x010180, 0x01, 0x0000_0000, PCI_IDS),
    "rtl8111e":       Model("Realtek RTL8111E Gigabit Ethernet", 0x10EC, 0x8168, 0x020000, 0x06, 0x0123_10EC, PCI_IDS),
    "aic-7870":       Model("Adaptec AIC-7870 SCSI",             0x9004, 0x7078, 0x010000, 0x03, 0x0000_0000, PCI_IDS),
    "ahci":           Model("Intel 82801IR (ICH9R) SATA AHCI",   0x8086, 0x2922, 0x010601, 0x02, 0x1100_1AF4, PCI_IDS),
    "virtio-net":     Model("Virtio network device",             0x1AF4, 0x1000, 0x020000, 0x00, 0x0001_1AF4,
                      "OASIS: Virtual I/O Device (VIRTIO) 1.2, and " + PCI_IDS),
}
# fmt: on


def address(number: int, register: int) -> int:
    """The configuration address of a register of device `number` on bus 0, as it is written to 0CF8H."""
    return ENABLE | number << 11 | register


def registers(model: Model) -> dict[int, int]:
    """What its registers hold that a kernel identifies a device by."""
    return {
        IDS: model.device << 16 | model.vendor,
        CLASS: model.class_code << 8 | model.revision,
        SUBSYSTEM: model.subsystem,
    }


def configuration(names: Sequence[str]) -> dict[int, int]:
    """{configuration address: value} of devices in order, from device 1 on."""
    return {
        address(number, register): value
        for number, name in enumerate((name for name in names if name in MODELS), 1)
        for register, value in registers(MODELS[name]).items()
    }


def meaning(at: int, value: int) -> str:
    """What a value read at a configuration address says, in words."""
    value &= NOTHING
    register = at & 0xFC
    if value == NOTHING and register == IDS:
        return "no device"
    for model in MODELS.values():
        if registers(model).get(register) == value and register == IDS:
            return f"{model.title}, {model.vendor:04x}:{model.device:04x}"
    if at and register == IDS:
        return f"device {value & 0xFFFF:04x}:{value >> 16:04x}"
    return f"{value:#010x}"
