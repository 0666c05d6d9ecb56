"""Made-up /sys trees with the names that boards have."""

from __future__ import annotations

from pathlib import Path

ORIN_NANO = {
    "sys/class/hwmon/hwmon0/name": "tmp451",
    "sys/class/hwmon/hwmon1/name": "ina3221",
    "sys/class/hwmon/hwmon1/in1_label": "VDD_IN",
    "sys/class/hwmon/hwmon1/in1_input": "5000",
    "sys/class/hwmon/hwmon1/curr1_input": "1200",
    "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV",
    "sys/class/hwmon/hwmon1/in2_input": "5000",
    "sys/class/hwmon/hwmon1/curr2_input": "400",
    "sys/class/hwmon/hwmon1/in3_label": "VDD_SOC",
    "sys/class/hwmon/hwmon1/in3_input": "5000",
    "sys/class/hwmon/hwmon1/curr3_input": "300",
    "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages",
    "sys/class/hwmon/hwmon1/in7_input": "12",
    "sys/class/hwmon/hwmon2/name": "ucsi_source_psy_2_00081",
    "sys/class/hwmon/hwmon2/in0_input": "5000",
    "sys/class/hwmon/hwmon2/curr1_input": "3000",
    "sys/class/devfreq/17000000.gpu/cur_freq": "624750000",
    "sys/class/devfreq/13e10000.host1x/cur_freq": "999000000",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1510400",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "729600",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal",
    "sys/class/thermal/thermal_zone0/temp": "48500",
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal",
    "sys/class/thermal/thermal_zone1/temp": "-256000",
    "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet",
    "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n",
}

AGX_ORIN = {
    "sys/class/hwmon/hwmon3/name": "ina3221",
    "sys/class/hwmon/hwmon3/update_interval": "200",
    "sys/class/hwmon/hwmon3/in1_label": "VDD_GPU_SOC",
    "sys/class/hwmon/hwmon3/in1_input": "19000",
    "sys/class/hwmon/hwmon3/curr1_input": "200",
    "sys/class/hwmon/hwmon3/in2_label": "VDD_CPU_CV",
    "sys/class/hwmon/hwmon3/in2_input": "19000",
    "sys/class/hwmon/hwmon3/curr2_input": "100",
    "sys/class/hwmon/hwmon3/in3_label": "VIN_SYS_5V0",
    "sys/class/hwmon/hwmon3/in3_input": "5000",
    "sys/class/hwmon/hwmon3/curr3_input": "700",
}

AGX_THOR = {
    "sys/class/hwmon/hwmon4/name": "ina238",
    "sys/class/hwmon/hwmon4/in1_label": "VIN",
    "sys/class/hwmon/hwmon4/power1_input": "31000000",
    "sys/class/hwmon/hwmon5/name": "ina3221",
    "sys/class/hwmon/hwmon5/in1_label": "VDD_GPU",
    "sys/class/hwmon/hwmon5/in1_input": "20000",
    "sys/class/hwmon/hwmon5/curr1_input": "500",
    "sys/class/hwmon/hwmon6/name": "ina3221",
    "sys/class/hwmon/hwmon6/in1_label": "USB-C VBUS",
    "sys/class/hwmon/hwmon6/in1_input": "20000",
    "sys/class/hwmon/hwmon6/curr1_input": "3000",
    "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000",
}


def board(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root
