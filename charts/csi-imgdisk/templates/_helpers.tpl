{{- define "csi-imgdisk.driver" -}}csi.imgdisk.dev{{- end }}

{{- define "csi-imgdisk.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if contains $name .Release.Name }}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}
{{- end }}

{{- define "csi-imgdisk.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "csi-imgdisk.labels" -}}
{{ include "csi-imgdisk.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "csi-imgdisk.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default (printf "v%s" .Chart.AppVersion) }}
{{- end }}

{{- /* The stores as the driver's --store-config has them. Directories that Kubernetes mounts are below one path in all pods. */}}
{{- define "csi-imgdisk.stores" -}}
{{- if not .Values.stores }}{{ fail "stores: want at least one, see values.yaml" }}{{ end }}
{{- $list := list }}
{{- range .Values.stores }}
{{- $store := dict "name" .name "init" (ne (toString .init) "false") }}
{{- if .nfs }}
{{- $_ := set $store "nfs" .nfs }}
{{- else if .smb }}
{{- $smb := dict "source" .smb.source "mountOptions" (.smb.mountOptions | default list) }}
{{- if .smb.secretName }}{{ $_ := set $smb "credentialsDir" (printf "/etc/csi-imgdisk/smb/%s" .name) }}{{ end }}
{{- $_ := set $store "smb" $smb }}
{{- else }}
{{- $_ := set $store "path" (printf "/var/lib/csi-imgdisk/stores/%s" .name) }}
{{- end }}
{{- $list = append $list $store }}
{{- end }}
{{- dict "stores" $list | mustToPrettyJson }}
{{- end }}

{{- /* "true" if the driver itself mounts a store. */}}
{{- define "csi-imgdisk.mounts" -}}
{{- range .Values.stores }}{{ if or .nfs .smb }}true{{ end }}{{ end }}
{{- end }}

{{- define "csi-imgdisk.controllerHostNetwork" -}}
{{- if eq (toString .Values.controller.hostNetwork) "auto" }}{{ ternary "true" "false" (ne (include "csi-imgdisk.mounts" .) "") }}
{{- else }}{{ .Values.controller.hostNetwork }}{{ end }}
{{- end }}

{{- /* Volumes and mounts of a container that opens stores. */}}
{{- define "csi-imgdisk.storeVolumes" -}}
- name: stores
  emptyDir: {medium: Memory, sizeLimit: 1Mi}
{{- range .Values.stores }}
{{- if .hostPath }}
- name: {{ printf "store-%s" .name | replace "." "-" | replace "_" "-" }}
  hostPath: {path: {{ .hostPath.path | quote }}, type: Directory}
{{- else if .claim }}
- name: {{ printf "store-%s" .name | replace "." "-" | replace "_" "-" }}
  persistentVolumeClaim: {claimName: {{ .claim.name | quote }}}
{{- else if and .smb .smb.secretName }}
- name: {{ printf "smb-%s" .name | replace "." "-" | replace "_" "-" }}
  secret: {secretName: {{ .smb.secretName | quote }}, defaultMode: 0400}
{{- end }}
{{- end }}
{{- end }}

{{- define "csi-imgdisk.storeMounts" -}}
- {name: stores, mountPath: /var/lib/csi-imgdisk/stores}
{{- range .Values.stores }}
{{- if .hostPath }}
- {name: {{ printf "store-%s" .name | replace "." "-" | replace "_" "-" }}, mountPath: {{ printf "/var/lib/csi-imgdisk/stores/%s" .name | quote }}, mountPropagation: HostToContainer}
{{- else if .claim }}
- {name: {{ printf "store-%s" .name | replace "." "-" | replace "_" "-" }}, mountPath: {{ printf "/var/lib/csi-imgdisk/stores/%s" .name | quote }}}
{{- else if and .smb .smb.secretName }}
- {name: {{ printf "smb-%s" .name | replace "." "-" | replace "_" "-" }}, mountPath: {{ printf "/etc/csi-imgdisk/smb/%s" .name | quote }}, readOnly: true}
{{- end }}
{{- end }}
{{- end }}

{{- /* The security context of a container that needs no privilege at all. */}}
{{- define "csi-imgdisk.unprivileged" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "csi-imgdisk.livenessSidecar" -}}
- name: liveness-probe
  image: {{ .root.Values.sidecars.livenessProbe.image }}
  args:
    - --csi-address=/csi/csi.sock
    - --health-port={{ .port }}
    - --probe-timeout=10s
  securityContext: {{- include "csi-imgdisk.unprivileged" .root | nindent 4 }}
  resources: {{- toYaml .root.Values.sidecars.livenessProbe.resources | nindent 4 }}
  volumeMounts:
    - {name: socket, mountPath: /csi}
{{- end }}

{{- define "csi-imgdisk.livenessProbe" -}}
# What answers is the last container, which starts when the images of all have been pulled.
startupProbe:
  httpGet: {path: /healthz, port: healthz}
  periodSeconds: 5
  timeoutSeconds: 12
  failureThreshold: 180
# The probe asks whether the driver runs, not whether stores answer.
livenessProbe:
  httpGet: {path: /healthz, port: healthz}
  periodSeconds: 30
  timeoutSeconds: 12
  failureThreshold: 5
{{- end }}
