"""What this machine's devices can do, and what they draw.

    dtype_on(device, "auto")                  bfloat16 where it is multiplied in hardware, else float32
    peak_flops(device, "bfloat16", None)      the MFU's denominator
    meter = Meter([device], "auto")           meter.method: nvml | nvml+rapl | rapl | model
    meter.joules()                            drawn since the meter was made; None: nothing here measures it

NVML counts a whole GPU and RAPL a whole CPU package, whoever uses them: sites that share a machine must say `energy: model`.
Neither counts DRAM, disks, fans or power supplies. Reading RAPL takes root, or `chmod a+r` on its energy_uj files.
"""

import ctypes
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pynvml
import torch

# TFLOP/s of one device, dense (without sparsity): float32 without TF32, which PyTorch leaves off, and bfloat16 on tensor cores.
PEAK_TFLOPS = {
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": (19.5, 312.0),  # A100 data sheet
    r"H100 80GB HBM3": (67.0, 989.0),  # H100 data sheet: SXM,
    r"H100 PCIe": (51.0, 756.0),  # PCIe,
    r"H100 NVL": (60.0, 835.0),  # NVL
    r"H200": (67.0, 989.0),  # H200 data sheet: SXM,
    r"H200 NVL": (60.0, 835.0),  # NVL
    r"GH200 .*": (67.0, 989.0),  # GH200 data sheet
    r"B200": (75.0, 2250.0),  # HGX B200 data sheet, an eighth of it
    r"GB200": (80.0, 2500.0),  # GB200 NVL72 data sheet, a 72nd of it
    r"V100-SXM2-(16|32)GB": (15.7, None),  # V100 data sheet; no bfloat16 on its tensor cores
    r"V100-PCIE-(16|32)GB": (14.0, None),
    r"T4": (8.1, None),  # T4 data sheet
    r"A10": (31.2, 125.0),  # A10 data sheet
    r"A40": (37.4, 149.7),  # A40 data sheet
    r"L4": (30.3, 121.0),  # L4 data sheet
    r"L40": (90.5, 181.0),  # L40 data sheet
    r"L40S": (91.6, 362.0),  # L40S data sheet
    r"RTX A6000": (38.7, 154.8),  # GA102 white paper
    r"RTX 6000 Ada Generation": (91.1, 364.2),  # Ada GPU architecture white paper
    r"GeForce RTX 3090": (35.6, 71.0),  # GA102 white paper, with FP32 accumulation
    r"GeForce RTX 4090": (82.6, 165.2),  # Ada GPU architecture white paper, likewise
    r"GeForce RTX 5090": (104.8, 209.5),  # RTX Blackwell architecture white paper, likewise
}
POWERCAP = Path("/sys/class/powercap")
ISAS_WITHOUT_BFLOAT16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")  # oneDNN's names
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
READ_EVERY_S = 30.0  # a RAPL counter wraps after 65 kJ or more: no package draws the 2.2 kW that would take


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether it does so in hardware: GPUs from Ampere on, CPUs with AVX512-BF16 or AMX. AVX-512 alone does not, nor does a CPU that
    ONEDNN_MAX_CPU_ISA holds to it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in ISAS_WITHOUT_BFLOAT16:
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def dtype_on(device: torch.device, dtype: str) -> str:
    """What a config's model.dtype means here: float32 or bfloat16."""
    return dtype if dtype != "auto" else "bfloat16" if multiplies_bfloat16(device) else "float32"


def keep_freed_memory() -> None:
    """Have glibc keep up to 1 GB of what this process frees. By default it gives it back to the system at once, and a step on a CPU asks
    for the same again, page by page: an eighth of a small model's time. Elsewhere than on glibc nothing happens."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # its largest


def peak_flops(device: torch.device, dtype: str, given_tflops: float | None) -> float | None:
    """Dense peak of one device in FLOP/s at float32 or bfloat16: as given, else of GPUs known by name; None: not known."""
    if given_tflops is not None:
        return 1e12 * given_tflops
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ").removeprefix("Tesla ")
    known = next((tflops for pattern, tflops in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)), (None, None))
    tflops = known[("float32", "bfloat16").index(dtype)]
    return None if tflops is None else 1e12 * tflops


class Meter:
    """Joules drawn since it was made by GPUs of this machine and by its CPU packages. Make one a machine, with the GPUs of all
    its ranks. Half a measurement is none: with a GPU that has no counter of its own the method is `model`."""

    def __init__(self, devices: list[torch.device], want: str, powercap: Path = POWERCAP):
        """want: auto | model, as in sites.NAME.energy."""
        gpus = [device for device in devices if device.type != "cpu"]
        nvml = _gpu_counters(gpus) if want == "auto" else []
        rapl = _package_counters(powercap) if want == "auto" and (nvml or not gpus) else []
        self.method = "+".join(["nvml"] * bool(nvml) + ["rapl"] * bool(rapl)) or "model"
        self._counters, self._total_uj, self._lock = nvml + rapl, 0, threading.Lock()
        self._last_uj = [read() for read, _ in self._counters]
        if rapl:
            threading.Thread(target=self._keep_up, name="meter", daemon=True).start()

    def joules(self) -> float | None:
        """Cumulative; None where the method is `model`, and where a counter cannot be read just now: the next reading has it."""
        with self._lock:
            try:
                now_uj = [read() for read, _ in self._counters]
            except (OSError, pynvml.NVMLError):
                return None
            self._total_uj += sum((now - last) % wrap for now, last, (_, wrap) in zip(now_uj, self._last_uj, self._counters))
            self._last_uj = now_uj
            return self._total_uj / 1e6 if self._counters else None

    def _keep_up(self) -> None:
        """So that no counter wraps twice between readings, however rarely the site asks; a process that was stopped for longer
        than a counter takes to wrap has missed that much."""
        while True:
            time.sleep(READ_EVERY_S)
            self.joules()


Counter = tuple[Callable[[], int], int]  # microjoules so far, and where they start again at 0


def _gpu_counters(gpus: list[torch.device]) -> list[Counter]:
    """NVML's counter of each GPU, once, found by UUID as CUDA may number them otherwise; [] if one has none of its own."""
    if not gpus or any(device.type != "cuda" for device in gpus):
        return []
    uuids = sorted({f"GPU-{torch.cuda.get_device_properties(device).uuid}" for device in gpus})
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        counters = [(partial(_gpu_uj, handle), 1000 << 64) for handle in handles]
        for read, _ in counters:
            read()
        return [] if any(map(_is_split, handles)) else counters
    except pynvml.NVMLError:  # no driver, too old a GPU, a MIG instance
        return []


def _gpu_uj(handle) -> int:
    return 1000 * pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)


def _is_split(handle) -> bool:
    """MIG: the counter is that of the whole GPU, which others use, too."""
    try:
        return pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError_NotSupported:
        return False


def _package_counters(powercap: Path) -> list[Counter]:
    """RAPL's counter of each CPU package, Intel's or AMD's; [] if one cannot be read. A package's parts, DRAM and the whole
    platform (psys) have domains of their own, which are left out."""
    try:
        zones = [zone for zone in sorted(powercap.glob("intel-rapl:*")) if re.fullmatch(r"intel-rapl:\d+", zone.name)]
        packages = [zone for zone in zones if (zone / "name").read_text().startswith("package")]
        counters = [(partial(_read_int, p / "energy_uj"), _read_int(p / "max_energy_range_uj")) for p in packages]
        for read, _ in counters:
            read()
        return counters
    except OSError:
        return []


def _read_int(path: Path) -> int:
    return int(path.read_text())
