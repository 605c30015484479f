package sanity

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// A driver is what differs between the values of BERTH_DRIVER.
type driver struct {
	// setup makes the storage beneath the instance's directory and returns its lines of the configuration.
	// instance.removeAll takes away every mount, FUSE process and loop device beneath that directory; anything else
	// that setup makes, it has to give to t.Cleanup itself.
	setup func(t *testing.T, i *instance) string
	// leftovers lists what should be gone when no volume and no snapshot exists.
	leftovers func(t *testing.T, i *instance) []string
	// capabilities is exactly what the driver has to advertise, in the words of advertised.
	capabilities []string
	// access lists the types of volume that the driver has, in csi-sanity's words.
	access []string
	// secrets says that setup has written secretsFile, which calls are then made with.
	secrets bool
	// parameters are those of the class.
	parameters map[string]string
	// mutableParameters are given to volumes that are made with, or modified to, a VolumeAttributesClass.
	mutableParameters map[string]string
}

// In the instance's directory; its form is that of csi-sanity.
const secretsFile = "secrets.yaml"

var drivers = map[string]driver{
	"nvme": {
		setup:     mountPool,
		leftovers: poolLeftovers,
		access:    []string{"mount", "block"},
		capabilities: []string{
			"controller CREATE_DELETE_VOLUME",
			"controller LIST_VOLUMES",
			"controller GET_CAPACITY",
			"controller CREATE_DELETE_SNAPSHOT",
			"controller LIST_SNAPSHOTS",
			"controller CLONE_VOLUME",
			"controller GET_VOLUME",
			"controller GET_SNAPSHOT",
			"controller SINGLE_NODE_MULTI_WRITER",
			"controller GET_VOLUME_HEALTH",
			"controller LIST_VOLUME_HEALTH",
			"node STAGE_UNSTAGE_VOLUME",
			"node GET_VOLUME_STATS",
			"node EXPAND_VOLUME",
			"node SINGLE_NODE_MULTI_WRITER",
			"node GET_VOLUME_HEALTH",
			"node GET_STORAGE_HEALTH",
			"plugin CONTROLLER_SERVICE",
			"plugin VOLUME_ACCESSIBILITY_CONSTRAINTS",
			"plugin SNAPSHOT_ACCESSIBILITY_CONSTRAINTS",
			"plugin expansion ONLINE",
		},
	},
	"s3": {
		setup:             describeService,
		leftovers:         serviceLeftovers,
		access:            []string{"mount"},
		secrets:           true,
		parameters:        s3Parameters(),
		mutableParameters: map[string]string{"limit": "none", "maxAge": "2s"},
		capabilities: []string{
			"controller CREATE_DELETE_VOLUME",
			"controller LIST_VOLUMES",
			"controller GET_VOLUME",
			"controller EXPAND_VOLUME",
			"controller MODIFY_VOLUME",
			"controller SINGLE_NODE_MULTI_WRITER",
			"controller GET_VOLUME_HEALTH",
			"controller LIST_VOLUME_HEALTH",
			"node STAGE_UNSTAGE_VOLUME",
			"node GET_VOLUME_STATS",
			"node SINGLE_NODE_MULTI_WRITER",
			"node VOLUME_MOUNT_GROUP",
			"node GET_VOLUME_HEALTH",
			"node GET_STORAGE_HEALTH",
			"plugin CONTROLLER_SERVICE",
			"plugin expansion ONLINE",
		},
	},
	"cephfs": {
		setup:             describeCluster,
		leftovers:         clusterLeftovers,
		access:            []string{"mount"},
		secrets:           true,
		mutableParameters: map[string]string{"pin": "distributed=1"},
		capabilities: []string{
			"controller CREATE_DELETE_VOLUME",
			"controller LIST_VOLUMES",
			"controller CREATE_DELETE_SNAPSHOT",
			"controller LIST_SNAPSHOTS",
			"controller CLONE_VOLUME",
			"controller GET_VOLUME",
			"controller GET_SNAPSHOT",
			"controller EXPAND_VOLUME",
			"controller MODIFY_VOLUME",
			"controller SINGLE_NODE_MULTI_WRITER",
			"controller GET_VOLUME_HEALTH",
			"controller LIST_VOLUME_HEALTH",
			"node STAGE_UNSTAGE_VOLUME",
			"node GET_VOLUME_STATS",
			"node SINGLE_NODE_MULTI_WRITER",
			"node GET_VOLUME_HEALTH",
			"node GET_STORAGE_HEALTH",
			"plugin CONTROLLER_SERVICE",
			"plugin expansion ONLINE",
		},
	},
}

// The pool is a sparse file: what the volumes don't write takes no space.
const poolSize = 64 << 30

// mountPool makes the XFS file system that nvme carves its volumes from. Reflinks are what snapshots need; mkfs.xfs
// has them on by default.
func mountPool(t *testing.T, i *instance) string {
	t.Helper()
	image, pool := i.path("pool.img"), i.path("pool")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, poolSize); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(pool, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, command := range [][]string{{"mkfs.xfs", "-q", image}, {"mount", "-o", "loop", image, pool}} {
		if out, err := exec.CommandContext(interrupted, command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", command, err, out)
		}
	}
	return "pools:\n  - {name: main, path: " + pool + "}\n"
}

// poolLeftovers lists mounts of volumes, loop devices on them, and whatever the pool still stores.
func poolLeftovers(t *testing.T, i *instance) []string {
	var left []string
	pool := i.path("pool")
	for _, mount := range mountsBeneath(t, i.dir) {
		if mount != pool {
			left = append(left, "mount "+mount)
		}
	}
	for device, file := range loopsBeneath(t, pool) {
		left = append(left, "loop device "+device+" on "+file)
	}
	for _, name := range []string{"volumes", "snapshots", "trash", "tmp"} {
		entries, err := os.ReadDir(filepath.Join(pool, name))
		if err != nil { // one that does not exist would mean that we look in the wrong place
			left = append(left, err.Error())
		}
		for _, entry := range entries {
			left = append(left, filepath.Join(pool, name, entry.Name()))
		}
	}
	return left
}
