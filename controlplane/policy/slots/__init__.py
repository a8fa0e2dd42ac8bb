"""How many requests a replica may run at once: controller.py decides, types.py says on what."""

from controlplane.policy.slots.controller import first_slots, next_slots
from controlplane.policy.slots.types import Gaps, SlotMemory, SlotObservation, SlotTarget

__all__ = ["Gaps", "SlotMemory", "SlotObservation", "SlotTarget", "first_slots", "next_slots"]
