#!/usr/bin/env bash
# Tell which GPUs this machine can train on: the quick path, which needs nothing but bash.
#
#     bash worker/detect_gpus.sh              a table on a terminal, else the report as one line
#     bash worker/detect_gpus.sh --nonce N    the line '@@GPU_REPORT N {...}' (schemas/gpu_report.schema.json)
#     ssh host 'exec bash --noprofile --norc -s -- --nonce N' < worker/detect_gpus.sh
#
# It answers by itself where nvidia-smi's CSV, AMD's compute topology in /sys, or the absence of everything leaves no
# doubt. Otherwise it hands over to detect_gpus.py beside it; without that, it gives the best answer that it has, with
# the reason in "hand_over". Whole numbers only, nothing is left behind, exit 0 whenever a report was printed.

export LC_ALL=C
set +eu # whatever the session's environment switched on
shopt -u failglob nullglob nocaseglob nocasematch

root=${GPU_DETECT_SYSROOT:-}
root=${root%/}
limit_cs=3000 # hundredths of a second that a tool may take
below=("$root/usr/lib/wsl/lib" "$root/opt/rocm/bin" "$root"/opt/rocm-*/bin "$root/usr/local/nvidia/bin"
  "$root/usr/local/cuda/bin" "$root/opt/bin" "$root/var/lib/nvidia/bin" "$root/run/current-system/sw/bin"
  "$root/opt/nvidia/bin")

vendor=NONE driver='' doubt='' signs='' odd='' hung='' running=''
slots=0 slots_use='' usable=0
codes=() messages=() indices=() order=()

forget_gpus() { names=() uuids=() totals=() frees=() capabilities=() arches=() migs=() integrated=() states=() busy=(); }

forget_gpus

# -- values: each function answers in REPLY ---------------------------------------------------------------------------

trim() { # $1 (its first 2000 characters) without spaces around it
  REPLY=${1:0:2000}
  REPLY=${REPLY#"${REPLY%%[![:space:]]*}"}
  REPLY=${REPLY%"${REPLY##*[![:space:]]}"}
}

known() { # $1 without spaces, '' for what stands for "unknown"
  trim "$1"
  case ${REPLY,,} in
    'n/a' | '[n/a]' | '[not supported]' | 'not supported' | '[unknown error]' | 'unknown error' | unknown | '[unknown]' \
      | '[not available]' | '[gpu is lost]' | '[gpu requires reset]' | 'err!' | '[insufficient permissions]' | none \
      | '[requested functionality has been deprecated]') REPLY='' ;;
  esac
}

whole() { # the number in $1 (at most 18 digits, perhaps with MiB), '' if it is none
  trim "$1"
  if [[ $REPLY =~ ^([0-9]{1,18})(\ *MiB)?$ ]]; then REPLY=$((10#${BASH_REMATCH[1]})); else REPLY=''; fi
}

quote() { # $1 as a JSON string of printable ASCII; null for ''
  local text=${1:0:200}
  text=${text//[^ -~]/?}
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  REPLY=null
  [[ -z $text ]] || REPLY="\"$text\""
}

read_line() { # the first line of file $1, '' if it can't be read
  REPLY=''
  { IFS= read -r REPLY <"$1"; } 2>/dev/null || true
  trim "$REPLY"
}

properties() { # the values of keys ${@:2} in a file of 'key value' lines, as p_<key>
  local key value
  for key in "${@:2}"; do printf -v "p_$key" ''; done
  {
    while read -r key value; do
      [[ " ${*:2} " != *" $key "* ]] || printf -v "p_$key" %s "$value"
    done <"$1"
  } 2>/dev/null
}

problem() { # code, message; each code once
  local code
  for code in "${codes[@]}"; do [[ $code != "$1" ]] || return 0; done
  codes+=("$1") messages+=("$2")
}

# -- tools -------------------------------------------------------------------------------------------------------------

clock() { # hundredths of a second since the machine's start
  read -r REPLY _ </proc/uptime
  REPLY=$((10#${REPLY/./}))
}

open_scratch() { # open a nameless file as $scratch_in for reading and $scratch_out for writing
  local folder file
  for folder in "${TMPDIR:-/tmp}" /tmp /dev/shm /var/tmp "$HOME"; do
    file=$(mktemp "$folder/gpus.XXXXXX" 2>/dev/null </dev/null) || continue
    { exec {scratch_out}>"$file"; } 2>/dev/null || continue
    exec {scratch_in}<"$file"
    rm -f "$file"
    return 0
  done
  return 1
}

end_tool() { [[ -z $running ]] || kill "-$1" -- "-$running" 2>/dev/null; }

run_tool() { # run ${@}; output (64 KiB at most) in $out, exit code in $code, 'hung' if it had to be ended
  local stage=0 deadline pause=0.02
  out='' code=127
  open_scratch || { code=126 && return; }
  set -m # a process group of its own, to be ended with all that it starts
  (ulimit -f 32768; exec "$@" </dev/null 1>&"$scratch_out" 2>/dev/null) &
  running=$!
  set +m
  clock
  deadline=$((REPLY + limit_cs))
  while kill -0 "$running" 2>/dev/null; do
    clock
    if ((REPLY >= deadline)); then
      case $stage in
        0) end_tool TERM ;;
        1) end_tool KILL ;;
        *) break ;; # not even KILL ends what sleeps in a broken driver: leave it
      esac
      ((stage == 0)) && deadline=$((REPLY + 150)) || deadline=$((REPLY + 30))
      stage=$((stage + 1))
    fi
    sleep $pause 2>/dev/null || sleep 1
    pause=0.05
  done
  if ((stage)); then
    code=hung hung="$hung ${1##*/}"
  else
    wait "$running" 2>/dev/null
    code=$?
  fi
  running=''
  out=$(head -c 65536 <&"$scratch_in" 2>/dev/null | tr -d '\r\0')
  exec {scratch_in}<&- {scratch_out}>&-
}

# -- NVIDIA ------------------------------------------------------------------------------------------------------------

nv_fields=index,uuid,pci.bus_id,memory.total,memory.free,driver_version,compute_cap,mig.mode.current,utilization.gpu
nv_fields+=,temperature.gpu,name # the name last: it may hold commas
nv_lost='a GPU has fallen off the bus: reboot the node; if it comes back, look at its power and its seat'
nv_reset='a GPU needs a reset: end what uses it, then sudo nvidia-smi --gpu-reset, or reboot the node'

nv_row() { # take the cells of one row (in the order of nv_fields) for a GPU
  local state=usable text=${*,,}
  if [[ $text == *'requires reset'* ]]; then
    state=reset
    problem NV_RESET_REQUIRED "$nv_reset"
  elif [[ $text == *'gpu is lost'* || ${2,,}${4,,} == *'unknown error'* ]]; then
    state=lost
    problem NV_GPU_LOST "$nv_lost"
  fi
  known "${11}" && names+=("$REPLY")
  known "$2" && uuids+=("$REPLY")
  whole "$4" && totals+=("${REPLY/#0/}")
  whole "$5" && frees+=("$REPLY")
  [[ -n $driver || ! $6 =~ ^[0-9]+(\.[0-9]+)* ]] || driver=${BASH_REMATCH[0]}
  if [[ $7 =~ ^[0-9]{1,3}\.[0-9]{1,3}$ ]]; then capabilities+=("$7"); else capabilities+=(''); fi
  if [[ ${8,,} == enabled ]]; then migs+=(true); else migs+=(false); fi
  arches+=('') integrated+=(false) states+=("$state") busy+=('')
}

nv_csv() { # take the rows in $out; errors may stand between them
  local line rest cells seen=' ' lines=0
  while IFS= read -r line && ((++lines)); do
    if ((lines > 500 || ${#line} > 2000)); then # bash is slow at picking rubbish to pieces
      odd+=rubbish
      break
    fi
    rest=$line cells=()
    while ((${#cells[@]} < 10)) && [[ $rest == *,* ]]; do
      trim "${rest%%,*}"
      cells+=("$REPLY")
      rest=${rest#*,}
    done
    trim "$rest"
    cells+=("$REPLY")
    if ((${#cells[@]} == 11)) && [[ ${cells[0]} =~ ^[0-9]{1,4}$ && $seen != *" ${cells[0]} "* ]]; then
      seen+="${cells[0]} "
      nv_row "${cells[@]}"
    elif [[ -n ${line// /} ]]; then
      odd+="${line,,} "
    fi
  done <<<"$out"
}

nv_busy() { # the memory that compute processes hold, by GPU
  local uuid pid used rest n
  run_tool "$1" --query-compute-apps=gpu_uuid,pid,used_gpu_memory,process_name --format=csv,noheader,nounits
  [[ $code == 0 && ${#out} -lt 60000 ]] || return 0
  for n in "${!uuids[@]}"; do [[ -z ${uuids[n]} ]] || busy[n]=0; done
  while IFS=, read -r uuid pid used rest; do
    trim "$pid"
    [[ $REPLY =~ ^[0-9]{1,10}$ && -n $rest ]] || continue
    whole "$used"
    used=$REPLY
    trim "$uuid"
    for n in "${!uuids[@]}"; do
      [[ -n $REPLY && ${uuids[n]} == "$REPLY" && -n ${busy[n]} ]] || continue
      if [[ -n $used ]]; then busy[n]=$((busy[n] + used)); else busy[n]=''; fi
    done
  done <<<"$out"
}

nv_fault() { # say what a failed nvidia-smi ($odd lines, $code) means
  local text=$odd
  case $code:$text in
    hung:*) problem NV_TIMEOUT "nvidia-smi did not answer within $((limit_cs / 100)) s: a dead GPU or driver; reboot the node" ;;
    *'driver/library version mismatch'* | 18:*) problem NV_LIB_MISMATCH \
      'NVIDIA driver and library differ: reboot the node, or reload the module' ;;
    *"couldn't communicate with the nvidia driver"* | *'driver not loaded'* | 9:*) problem NV_DRIVER_NOT_LOADED \
      'the NVIDIA driver is not loaded: sudo modprobe nvidia; if that fails, install the driver for this kernel and reboot' ;;
    *libnvidia-ml* | 12:*) problem NV_NVML_MISSING \
      'nvidia-smi finds no libnvidia-ml.so: in a container, start it with the NVIDIA runtime; else reinstall the driver' ;;
    *'insufficient permissions'* | 4:*) problem NV_PERMISSION \
      'this user may not open the GPUs: look at ls -l /dev/nvidia* and ask for access to their group' ;;
    *'no devices were found'* | 6:*) problem NV_NO_DEVICES \
      'the NVIDIA driver is loaded and finds no GPU: sudo dmesg | grep -i nvrm says why; power off, reseat, reboot' ;;
    *'unable to determine the device handle'* | *'gpu is lost'* | 15:*) problem NV_GPU_LOST "$nv_lost" ;;
    *'failed to initialize nvml'* | *'unknown error'* | 255:*) problem NV_UNKNOWN \
      'nvidia-smi fails with an unknown error: in a container, restart it; else reboot' ;;
    *) problem TOOL_BAD_OUTPUT 'nvidia-smi said what this script does not understand' ;;
  esac
}

find_nvidia() {
  local tool n here=0
  tool=$(type -P nvidia-smi)
  if [[ -z $tool ]]; then
    read_line "$root/proc/device-tree/model"
    for n in "$root"/dev/nvidia[0-9]* "$root"/proc/driver/nvidia/gpus/* "$root/etc/nv_tegra_release"; do
      [[ ! -e $n && ${REPLY,,} != *jetson* ]] || signs=NVIDIA
    done
    [[ -z $signs ]] || doubt='there are signs of an NVIDIA GPU, and no nvidia-smi'
    return
  fi
  vendor=NVIDIA
  run_tool "$tool" "--query-gpu=$nv_fields" --format=csv,noheader,nounits
  nv_csv
  if [[ -n $odd || $code != 0 ]] || ((${#names[@]} == 0)); then
    doubt="nvidia-smi's answer (exit $code) isn't plain CSV"
    if [[ $code != 0 || $odd == *'device handle'* || $odd == *'is lost'* ]] || ((${#names[@]} == 0)); then nv_fault; fi
    return
  fi
  nv_busy "$tool"
  [[ $code != hung ]] || nv_fault
  for n in "$root"/dev/nvidia[0-9]*; do [[ ! -e $n ]] || here=$((here + 1)); done
  ((here <= ${#names[@]})) || doubt="$here NVIDIA device files, and nvidia-smi lists ${#names[@]}"
}

# -- AMD ---------------------------------------------------------------------------------------------------------------

amd_name() { # the name of PCI device $1, '' if it isn't one of those for data centres
  case $1 in
    738c) REPLY='AMD Instinct MI100' ;; 7408 | 740c) REPLY='AMD Instinct MI250X' ;; 740f) REPLY='AMD Instinct MI210' ;;
    74a0) REPLY='AMD Instinct MI300A' ;; 74a1) REPLY='AMD Instinct MI300X' ;; 74a2) REPLY='AMD Instinct MI308X' ;;
    74a5) REPLY='AMD Instinct MI325X' ;; 74b9) REPLY='AMD Instinct MI325X VF' ;; 75a0) REPLY='AMD Instinct MI350X' ;;
    75a3) REPLY='AMD Instinct MI355X' ;; *) REPLY='' ;;
  esac
}

gfx_name() { # KFD's gfx_target_version as a target: 90010 is gfx90a
  whole "$1"
  printf -v REPLY 'gfx%d%x%x' $((${REPLY:-0} / 10000)) $((${REPLY:-0} / 100 % 100)) $((${REPLY:-0} % 100))
}

amd_integrated() { # is the GPU of DRM folder $1 and target $2 an integrated one?
  local total gtt
  read_line "$1/mem_info_vram_vendor" && known "$REPLY" # older kernels have it for all, with "unknown" in it
  [[ -z $REPLY && ! -e $1/board_info ]] || return 1
  read_line "$1/mem_info_vram_total" && whole "$REPLY" && total=$((${REPLY:-0} >> 20))
  read_line "$1/mem_info_gtt_total" && whole "$REPLY" && gtt=$((${REPLY:-0} >> 20))
  ((total == 0 || total > 4096 || gtt < 8192 || gtt < 4 * total)) || return 0
  case $2 in
    gfx902 | gfx909 | gfx90c | gfx1013 | gfx1033 | gfx103[567] | gfx1103 | gfx115[0123]) return 0 ;;
  esac
  return 1
}

p_simd_count='' p_vendor_id='' p_device_id='' p_gfx_target_version='' p_location_id='' p_domain=''
p_drm_render_minor='' p_unique_id='' p_local_mem_size='' p_heap_type='' p_size_in_bytes=''

kfd_node() { # take node folder $1 if it is a GPU
  local bank memory=0 device drm name arch id=''
  properties "$1/properties" simd_count vendor_id device_id gfx_target_version location_id domain drm_render_minor \
    unique_id local_mem_size
  [[ $p_vendor_id == 4098 && $p_simd_count =~ ^[1-9][0-9]{0,8}$ ]] || return 0
  drm=$root/sys/class/drm/renderD$p_drm_render_minor/device
  for bank in "$1"/mem_banks/*/properties; do
    [[ -e $bank ]] || continue
    properties "$bank" heap_type size_in_bytes
    whole "$p_size_in_bytes"
    [[ ! $p_heap_type =~ ^[12]$ || -z $REPLY ]] || memory=$((memory + REPLY))
  done
  whole "$p_local_mem_size"
  ((memory)) || memory=${REPLY:-0}
  ((memory)) || { read_line "$drm/mem_info_vram_total" && whole "$REPLY" && memory=${REPLY:-0}; }
  whole "$p_device_id" && printf -v device %04x "${REPLY:-0}"
  read_line "$drm/product_name" && known "$REPLY" && name=$REPLY
  [[ -n $name ]] || { amd_name "$device" && name=$REPLY; }
  [[ -n $name ]] || { name="AMD GPU 0x$device" && doubt='detect_gpus.py can ask ROCm for names'; }
  gfx_name "$p_gfx_target_version" && arch=$REPLY
  [[ $arch =~ ^gfx[1-9][0-9a-f]{2,4}$ ]] || arch=''
  [[ ! $p_unique_id =~ ^[1-9][0-9]{0,19}$ ]] || printf -v id 'GPU-%016x' "$p_unique_id" 2>/dev/null
  names+=("$name") uuids+=("$id") arches+=("$arch") frees+=('') capabilities+=('') migs+=(false) states+=(usable)
  busy+=('')
  if ((memory >> 20)); then totals+=($((memory >> 20))); else totals+=(''); fi
  if amd_integrated "$drm" "$arch"; then integrated+=(true); else integrated+=(false); fi
  whole "$p_location_id"
  cards+=("$p_domain/$((${REPLY:-0} >> 3))/$p_unique_id")
}

find_amd() {
  local nodes=$root/sys/class/kfd/kfd/topology/nodes number n last=-1 discrete=0 cards=() card count=0 before=''
  for n in "$nodes"/[0-9]*; do
    number=${n##*/}
    [[ ! $number =~ ^[0-9]{1,4}$ ]] || ((10#$number <= last)) || last=$((10#$number))
  done
  for ((n = 0; n <= last; n++)); do [[ ! -d $nodes/$n ]] || kfd_node "$nodes/$n"; done
  ((${#names[@]})) || return 0
  vendor=AMD
  read_line "$root/sys/module/amdgpu/version"
  driver=$REPLY
  for n in "${integrated[@]}"; do [[ $n == true ]] || discrete=1; done
  ((!discrete)) || for n in "${!integrated[@]}"; do [[ ${integrated[n]} == false ]] || states[n]=left; done
  for card in "${cards[@]}"; do
    [[ $before == *" $card "* ]] || count=$((count + 1))
    before+=" $card "
  done
  ((count == ${#names[@]})) || problem PARTITIONED \
    "$count card$( ((count == 1)) || printf s) in ${#names[@]} partitions; each is one slot"
  kfd_open
}

find_amd_instead() { # where nvidia-smi tells no GPU: its problem stays unless a discrete AMD GPU is there
  local was=$vendor old_codes=("${codes[@]}") old_messages=("${messages[@]}") n
  codes=() messages=()
  find_amd
  [[ $was == NVIDIA ]] || return 0
  for n in "${!states[@]}"; do [[ ${states[n]} != usable || ${integrated[n]} == true ]] || return 0; done
  vendor=NVIDIA codes=("${old_codes[@]}") messages=("${old_messages[@]}")
  forget_gpus
}

kfd_open() { # mark all unusable if /dev/kfd is missing or closed; a root without /dev says nothing
  local n user
  [[ -d $root/dev ]] || return 0
  if [[ ! -e $root/dev/kfd ]]; then
    problem AMD_NO_KFD "an AMD GPU is here without /dev/kfd, so that ROCm can't use it: load amdgpu with compute support \
(install ROCm), or in a container pass --device=/dev/kfd --device=/dev/dri"
  elif [[ ! -r $root/dev/kfd || ! -w $root/dev/kfd ]]; then
    user=$(id -un </dev/null)
    problem AMD_KFD_PERMISSION "user $user may not open /dev/kfd: sudo usermod -aG render,video $user, then log in again"
  else
    return 0
  fi
  for n in "${!states[@]}"; do states[n]=lost; done
}

# -- the bus and other tools: is there more than was found? -----------------------------------------------------------------

bus_gpus() { # count GPUs on the PCI bus by vendor: nvidia amd intel; integrated ones that nobody trains on left out
  local folder class maker device
  nvidia=0 amd=0 intel=0 bus_seen=''
  for folder in "$root"/sys/bus/pci/devices/*; do
    [[ -e $folder/class ]] || continue
    bus_seen=1
    read_line "$folder/class" && class=${REPLY#0x}
    [[ $class == 0300* || $class == 0302* || $class == 0380* || $class == 1200* ]] || continue
    read_line "$folder/vendor" && maker=$REPLY
    read_line "$folder/device" && device=${REPLY#0x}
    read_line "$folder/revision"
    [[ $REPLY != 0xff ]] || doubt="${folder##*/} no longer answers on the bus"
    case $maker:$class in
      0x10de:030[02]*) nvidia=$((nvidia + 1)) ;;
      0x1002:*) case $device in
        515e | 4752) ;; # on servers' mainboards
        15d[d8] | 163[68f] | 164[cde] | 1681 | 15bf | 15c8 | 15e7 | 1506 | 13c0 | 150e | 190[01] | 1114) weak=1 ;;
        *) amd=$((amd + 1)) ;;
      esac ;;
      0x8086:0380*) if [[ ${folder##*/} == 0000:00:02.* ]]; then weak=1; else intel=$((intel + 1)); fi ;;
      0x8086:03*) if [[ ${folder##*/} == 0000:00:* ]]; then weak=1; else intel=$((intel + 1)); fi ;;
    esac
  done
}

compare_bus() { # doubt an answer that the bus or another vendor's tools contradict
  local nvidia amd intel bus_seen weak='' discrete=0 n
  bus_gpus
  for n in "${integrated[@]}"; do [[ $n == true ]] || discrete=$((discrete + 1)); done
  case $vendor in
    NVIDIA)
      ((amd + intel == 0 && (!${#bus_seen} || nvidia <= discrete))) ||
        doubt="on the PCI bus are $nvidia NVIDIA, $amd AMD and $intel Intel GPUs"
      [[ -n $bus_seen || -z $(type -P lspci) ]] || doubt='only lspci can tell what else is on the bus'
      ;;
    AMD) ((nvidia + intel == 0 && amd <= discrete)) ||
      doubt="on the PCI bus are $nvidia NVIDIA, $amd AMD and $intel Intel GPUs" ;;
    NONE)
      if ((nvidia + amd + intel)); then
        if ((nvidia)); then vendor=NVIDIA; elif ((amd)); then vendor=AMD; else vendor=INTEL; fi
        problem HW_WITHOUT_DRIVER "$vendor hardware is on the PCI bus, and nothing that drives it answers"
        doubt='hardware on the PCI bus that no quick way explains'
      elif [[ -z $bus_seen && ( -n $(type -P lspci) || -d $root/sys/class/drm ) ]]; then
        doubt='what is on the PCI bus has to be asked elsewhere'
      elif [[ -n $weak && -z $doubt ]]; then
        problem IGPU_ONLY 'only integrated graphics, not fit for training'
      fi
      for n in xpu-smi rocminfo rocm-smi amd-smi; do
        [[ -n $(type -P $n) ]] || continue
        doubt="$n is here, and no quick way tells what it knows"
        if [[ $n == xpu-smi ]]; then signs=INTEL; else signs=AMD; fi
      done
      ;;
  esac
  for n in xpu-smi rocm-smi amd-smi; do
    [[ $vendor != NVIDIA || -z $(type -P $n) ]] || doubt="$n is here too"
  done
}

# -- the report ---------------------------------------------------------------------------------------------------------

number_slots() { # give each GPU that the runtime enumerates its number; the others stand last in $order
  local n others=()
  for n in "${!states[@]}"; do
    indices[n]=''
    case ${states[n]} in
      usable) usable=$((usable + 1)) slots_use+="${slots_use:+, }$slots" ;;
      lost) others+=("$n") && continue ;;
    esac
    order+=("$n") indices[n]=$slots
    slots=$((slots + 1))
  done
  order+=("${others[@]}")
}

models() { # the different GPUs to train on, one a line
  local n
  for n in "${!states[@]}"; do
    [[ ${states[n]} != usable ]] || printf '%s, %s MiB\n' "${names[n]:-unknown}" "${totals[n]:-unknown}"
  done | sort -u
}

add_notices() { # what isn't wrong and still worth knowing
  local n left=0 alone=1 held='' name value kinds
  for n in "${!states[@]}"; do
    if [[ ${states[n]} == left ]]; then left=1; fi
    [[ ${states[n]} == usable ]] || continue
    [[ ${integrated[n]} == true ]] || alone=0
    [[ ${migs[n]} == false ]] || problem MIG_ENABLED "a GPU in MIG mode is one slot with the memory of one instance: \
sudo nvidia-smi -i N -mig 0 gives the whole GPU"
    ((${busy[n]:-0} <= 1024)) || held+="${held:+, }slot ${indices[n]}: ${busy[n]} MiB"
  done
  ((!usable || !alone)) || problem IGPU_ONLY "the only GPU is an integrated one: it shares the machine's memory"
  ((!left)) || problem IGPU_PRESENT 'integrated graphics have a slot number too: leave that slot out (--include)'
  kinds=$(models </dev/null)
  [[ $kinds != *$'\n'* || " ${codes[*]} " == *' PARTITIONED '* ]] || problem MIXED_MODELS \
    "different GPUs in one machine (${kinds//$'\n'/; }): the slowest and smallest sets the pace"
  [[ -z $held ]] || problem GPU_BUSY "other programs compute here ($held): see nvidia-smi or rocm-smi --showpids"
  case $vendor in
    NVIDIA) set -- CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES ;;
    AMD) set -- ROCR_VISIBLE_DEVICES HIP_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES GPU_DEVICE_ORDINAL ;;
    *) set -- ;;
  esac
  for name in "$@"; do
    [[ -n ${!name+set} && ${!name} != all ]] || continue
    value=${!name}
    [[ $name != GPU_DEVICE_ORDINAL ]] || name=HIP_VISIBLE_DEVICES
    problem "${name}_SET" "$name=$value is set for this user; all GPUs are listed here all the same, and DeepSpeed sets its own"
  done
}

status() { # REPLY: none, ok, degraded or error
  local n
  REPLY=none
  [[ $vendor != NONE ]] || return 0
  REPLY=error
  ((usable)) || return 0
  REPLY=ok
  for n in "${states[@]}"; do [[ $n == usable || $n == left ]] || REPLY=degraded; done
  for n in "${codes[@]}"; do
    case $n in
      MIG_ENABLED | PARTITIONED | IGPU_* | MIXED_* | GPU_BUSY | *_SET) ;;
      *) REPLY=degraded ;;
    esac
  done
}

gpu_json() { # row $1
  local n=$1 name uuid capability arch able=false
  quote "${names[n]}" && name=$REPLY
  quote "${uuids[n]}" && uuid=$REPLY
  quote "${capabilities[n]}" && capability=$REPLY
  quote "${arches[n]}" && arch=$REPLY
  if [[ ${states[n]} == usable ]]; then able=true; fi
  printf '{"index": %s, "name": %s, "uuid": %s, "memory_total_mib": %s, "memory_free_mib": %s, ' \
    "${indices[n]:-null}" "$name" "$uuid" "${totals[n]:-null}" "${frees[n]:-null}"
  printf '"compute_capability": %s, "arch": %s, "mig": %s, "integrated": %s, "usable": %s, "busy_mib": %s}' \
    "$capability" "$arch" "${migs[n]}" "${integrated[n]}" "$able" "${busy[n]:-null}"
}

print_json() { # the report as one line
  local n host comma=''
  quote "${HOSTNAME:-unknown}" && host=$REPLY
  status
  printf '{"schema": "gpu-report/1", "detector": "detect_gpus.sh", "hostname": %s, "vendor": "%s", "status": "%s", ' \
    "$host" "$vendor" "$REPLY"
  quote "$driver"
  printf '"slots_total": %s, "slots_use": [%s], "driver_version": %s, "gpus": [' "$slots" "$slots_use" "$REPLY"
  for n in "${order[@]}"; do
    printf %s "$comma"
    gpu_json "$n"
    comma=', '
  done
  printf '], "problems": ['
  comma=''
  for n in "${!codes[@]}"; do
    quote_long "${messages[n]}"
    printf '%s{"code": "%s", "message": %s}' "$comma" "${codes[n]}" "$REPLY"
    comma=', '
  done
  printf ']'
  quote_long "$doubt"
  [[ -z $doubt ]] || printf ', "hand_over": %s' "$REPLY"
  printf '}\n'
}

quote_long() { # as quote, for sentences
  local text=$1 whole_text=''
  while [[ -n $text ]]; do
    quote "$text"
    whole_text+=${REPLY:1:${#REPLY}-2}
    text=${text:200}
  done
  REPLY="\"$whole_text\""
}

print_table() { # the report for people
  local n state wide=4 form
  status
  if [[ $vendor == NONE ]]; then
    printf '%s: no GPU to train on\n' "${HOSTNAME:-unknown}"
  else
    printf '%s: %s, %s, %s slot%s%s\n' "${HOSTNAME:-unknown}" "$vendor" "$REPLY" "$slots" \
      "$( ((slots == 1)) || printf s)" "${driver:+, driver $driver}"
  fi
  for n in "${names[@]}"; do ((${#n} <= wide)) || wide=${#n}; done
  form="  %-4s  %-${wide}s  %6s  %6s  %6s"
  # shellcheck disable=SC2059
  ((${#names[@]} == 0)) || printf "$form\n" slot name MiB free busy
  for n in "${order[@]}"; do
    case ${states[n]} in usable) state='' ;; left) state='  integrated, left out' ;; *) state='  UNUSABLE' ;; esac
    # shellcheck disable=SC2059
    printf "$form%s\n" "${indices[n]:--}" "${names[n]:-?}" "${totals[n]:-?}" "${frees[n]:-?}" \
      "${busy[n]:-?}" "$state"
  done
  for n in "${!codes[@]}"; do printf '  %s: %s\n' "${codes[n]}" "${messages[n]}"; done
  [[ -z $doubt ]] || printf '  not sure: %s (python3 detect_gpus.py looks closer)\n' "$doubt"
}

hand_over() { # let detect_gpus.py beside this script answer, if both it and Python are here
  local here=${BASH_SOURCE[0]:-} name python=''
  [[ -f $here ]] || return 0
  [[ $here == */* ]] || here=./$here
  here=${here%/*}/detect_gpus.py
  [[ -f $here ]] || return 0
  for name in python3 /usr/bin/python3 /usr/libexec/platform-python; do
    name=$(type -P "$name") || continue
    "$name" -c 'import sys; sys.exit(sys.version_info < (3, 8))' </dev/null 2>/dev/null || continue
    python=$name
    break
  done
  [[ -n $python ]] || return 0
  export GPU_DETECT_HUNG=$hung
  exec "$python" -I "$here" "$@" </dev/null
}

usage() {
  printf 'usage: detect_gpus.sh [--nonce N] [--json] [--table]\n'
  printf '  --nonce N  print the line @@GPU_REPORT N {...}\n  --json     that line, on a terminal too\n'
  printf '  --table    the table, without a terminal too\n'
}

main() {
  local nonce=- form='' given=("$@") place
  while (($#)); do
    case $1 in
      --nonce) nonce=${2:-} && form=json && shift ;;
      --nonce=*) nonce=${1#*=} && form=json ;;
      --json) form=json ;;
      --table) form=table ;;
      -h | --help) usage && return 0 ;;
      *) usage >&2 && return 2 ;;
    esac
    shift
  done
  [[ $nonce =~ ^[0-9A-Za-z_.-]{1,64}$ ]] || { usage >&2 && return 2; }
  [[ ! ${GPU_DETECT_TIMEOUT:-} =~ ^([0-9]{1,4})(\.([0-9]{1,2}))?$ ]] || {
    limit_cs="${BASH_REMATCH[3]}00" && limit_cs=$((10#${BASH_REMATCH[1]} * 100 + 10#${limit_cs:0:2}))
  }
  ((limit_cs >= 50)) || limit_cs=50
  [[ -n $root ]] || PATH+=:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
  for place in "${below[@]}"; do PATH+=":$place"; done
  trap 'end_tool KILL; exit 143' HUP INT TERM

  find_nvidia
  if ((${#names[@]})); then look_for_amd_too; else find_amd_instead; fi
  compare_bus
  if [[ -n $doubt ]]; then
    hand_over "${given[@]}"
    [[ $vendor != NONE || -z $signs ]] || {
      vendor=$signs
      problem TOOL_BAD_OUTPUT "$doubt: with Python 3.8 or newer on this machine there would be an answer"
    }
  fi
  number_slots
  ((usable == 0)) || add_notices
  if [[ $form == table || ( -z $form && -t 1 ) ]]; then
    print_table
  else
    printf '\n@@GPU_REPORT %s ' "$nonce" # a newline first: a login banner may have ended without one
    print_json
  fi
}

look_for_amd_too() { # doubt NVIDIA's answer if the kernel has AMD GPUs that aren't integrated
  local n
  for n in "$root"/sys/class/kfd/kfd/topology/nodes/*; do
    properties "$n/properties" simd_count vendor_id drm_render_minor gfx_target_version
    [[ $p_vendor_id == 4098 && $p_simd_count =~ ^[1-9] ]] || continue
    gfx_name "$p_gfx_target_version"
    amd_integrated "$root/sys/class/drm/renderD$p_drm_render_minor/device" "$REPLY" || doubt='AMD GPUs are here too'
  done
}

main "$@"
