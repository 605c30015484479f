package sanity

// CephFS: the cluster is one of scripts/lab.sh, whose DIR/env is in our environment.

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// lab returns what the cluster's env file says under this name.
func lab(t *testing.T, name string) string {
	t.Helper()
	value := os.Getenv("BERTH_LAB_" + name)
	if value == "" {
		t.Fatalf("BERTH_LAB_%s is not set: start a cluster with scripts/lab.sh up DIR, and source DIR/env", name)
	}
	return value
}

// describeCluster returns the cluster that the driver is to use, and writes the secrets that calls carry, as
// Kubernetes would give them: a user for the controller and another one for the node, neither of which can do what
// the other does.
func describeCluster(t *testing.T, i *instance) string {
	t.Helper()
	var secrets strings.Builder
	for user, calls := range map[string][]string{
		"PROVISIONER": {
			"CreateVolume", "DeleteVolume", "ControllerValidateVolumeCapabilities", "ControllerExpandVolume",
			"ControllerModifyVolume", "CreateSnapshot", "DeleteSnapshot", "ListSnapshots", "GetSnapshot",
		},
		"NODE": {"NodeStageVolume", "NodePublishVolume"},
	} {
		for _, call := range calls {
			fmt.Fprintf(&secrets, "%sSecret: {userID: %q, userKey: %q}\n", call, lab(t, user+"_USER"), lab(t, user+"_KEY"))
		}
	}
	if err := os.WriteFile(i.path(secretsFile), []byte(secrets.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	monitors := strings.ReplaceAll(lab(t, "MONITORS"), ",", "', '")
	return fmt.Sprintf("clusters:\n  - {name: main, monitors: ['%s'], filesystems: [cephfs], groups: [csi], user: %s, keyFile: %s/provisioner.key}\n",
		monitors, lab(t, "PROVISIONER_USER"), lab(t, "DIR"))
}

// clusterLeftovers lists mounts, the processes that serve them, and whatever the group still has.
func clusterLeftovers(t *testing.T, i *instance) []string {
	var left []string
	for _, mount := range mountsBeneath(t, i.dir) {
		left = append(left, "mount "+mount)
	}
	for pid, command := range fusesBeneath(t, i.dir) {
		left = append(left, fmt.Sprintf("process %d: %s", pid, command))
	}
	// Fails if the group does not exist, which would mean that we look in the wrong place.
	command := exec.CommandContext(interrupted, "ceph", "--conf", lab(t, "CONF"), "--connect-timeout", "10",
		"fs", "subvolume", "ls", "cephfs", "--group_name", "csi", "--format", "json")
	out, err := command.Output()
	if err != nil {
		return append(left, fmt.Sprintf("%q: %v", command.Args, err))
	}
	var subvolumes []struct{ Name string }
	if err := json.Unmarshal(out, &subvolumes); err != nil {
		return append(left, fmt.Sprintf("%q: %v: %s", command.Args, err, out))
	}
	for _, subvolume := range subvolumes {
		left = append(left, "subvolume "+subvolume.Name)
	}
	return left
}
