// Package sanity holds berth against what others define: its .proto files against the published ones, and the running
// binary against csi-sanity.
//
//	BERTH_BIN=/path/of/berth [BERTH_DRIVER=nvme|cephfs|s3] go test -v ./...
//
// runs everything, as root, and cephfs with a cluster's DIR/env (scripts/lab.sh) in the environment; `go test -run Proto ./...` needs neither root nor a binary.
package sanity

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"
)

// All access types are one test, because ginkgo runs one suite per process. Each has an instance of its own: the
// suite counts volumes, and it gives the same names to volumes of all types.
func TestSanity(t *testing.T) {
	gomega.RegisterFailHandler(ginkgo.Fail)
	instances := map[string]*instance{}
	for _, access := range driverUnderTest(t).access {
		i := start(t)
		instances[access] = i
		config := i.sanityConfig(access)
		ginkgo.Describe(access, func() {
			suite := sanity.GinkgoTest(&config)
			t.Cleanup(suite.Finalize) // before berth is stopped, which waits for its connections
		})
	}
	var report ginkgo.Report
	ginkgo.ReportAfterSuite("report", func(r ginkgo.Report) { report = r })

	suite, reporter := ginkgo.GinkgoConfiguration()
	if deadline, set := t.Deadline(); set {
		suite.Timeout = time.Until(deadline) - time.Minute // go test's own time-out would leave no time to clean up
	}
	reporter.NoColor = true
	suite.SkipStrings = append(suite.SkipStrings, driverUnderTest(t).without...)
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)
	if interrupted.Err() != nil {
		t.Fatal("interrupted")
	}

	for _, access := range slices.Sorted(maps.Keys(instances)) {
		checkReport(t, report, access, instances[access].driver)
		instances[access].expectNothingLeft(t)
	}
}

func (i *instance) sanityConfig(access string) sanity.TestConfig {
	config := sanity.NewTestConfig()
	config.Address = "unix://" + i.nodeSocket()
	config.ControllerAddress = "unix://" + i.controllerSocket()
	config.DialOptions = append(config.DialOptions, grpc.WithUnaryInterceptor(measureReply))
	config.ControllerDialOptions = append(config.ControllerDialOptions, grpc.WithUnaryInterceptor(measureReply))
	config.TargetPath = i.path("target")
	config.StagingPath = i.path("staging")
	config.TestVolumeAccessType = access
	config.TestVolumeSize = 1 << 30
	config.TestVolumeExpandSize = 2 << 30
	if i.driver.secrets {
		config.SecretsFile = i.path(secretsFile)
	}
	config.TestVolumeParameters = i.driver.parameters
	config.TestVolumeMutableParameters = i.driver.mutableParameters
	return config
}

// measureReply lets csi-test compare what it should: one spec compares a topology that it sent with one that it
// received by reflect.DeepEqual, and sending has left a cached size in the first that receiving does not leave in
// the second.
func measureReply(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	err := invoke(ctx, method, request, reply, conn, options...)
	if message, ok := reply.(proto.Message); ok {
		proto.Size(message)
	}
	return err
}

// skips maps each reason for which csi-sanity skips a spec to the capability that the driver then lacks. A reason
// that is not here (an unknown capacity, a filter on the command line) is not a good one for any of our drivers.
var skips = map[string]string{
	"GetCapacity not supported":                                   "controller GET_CAPACITY",
	"ListVolumes not supported":                                   "controller LIST_VOLUMES",
	"CreateVolume not supported":                                  "controller CREATE_DELETE_VOLUME",
	"DeleteVolume not supported":                                  "controller CREATE_DELETE_VOLUME",
	"Snapshot not supported":                                      "controller CREATE_DELETE_SNAPSHOT",
	"CreateSnapshot not supported":                                "controller CREATE_DELETE_SNAPSHOT",
	"DeleteSnapshot not supported":                                "controller CREATE_DELETE_SNAPSHOT",
	"ListSnapshots not supported":                                 "controller LIST_SNAPSHOTS",
	"GetSnapshot not supported":                                   "controller GET_SNAPSHOT",
	"Volume Cloning not supported":                                "controller CLONE_VOLUME",
	"Modify volume not supported":                                 "controller MODIFY_VOLUME",
	"Modify Volume not supported":                                 "controller MODIFY_VOLUME",
	"ControllerModifyVolume not supported":                        "controller MODIFY_VOLUME",
	"ControllerExpandVolume not supported":                        "controller EXPAND_VOLUME",
	"ControllerGetVolumeHealth not supported":                     "controller GET_VOLUME_HEALTH",
	"ControllerListVolumeHealth not supported":                    "controller LIST_VOLUME_HEALTH",
	"ControllerPublishVolume not supported":                       "controller PUBLISH_UNPUBLISH_VOLUME",
	"ControllerUnpublishVolume not supported":                     "controller PUBLISH_UNPUBLISH_VOLUME",
	"Controller Publish, UnpublishVolume not supported":           "controller PUBLISH_UNPUBLISH_VOLUME",
	"ControllerPublishVolume.readonly field not supported":        "controller PUBLISH_READONLY",
	"NodeStageVolume not supported":                               "node STAGE_UNSTAGE_VOLUME",
	"NodeUnstageVolume not supported":                             "node STAGE_UNSTAGE_VOLUME",
	"NodeGetVolume not supported":                                 "node GET_VOLUME_STATS",
	"NodeExpandVolume not supported":                              "node EXPAND_VOLUME",
	"NodeGetVolumeHealth not supported":                           "node GET_VOLUME_HEALTH",
	"NodeGetStorageHealth not supported":                          "node GET_STORAGE_HEALTH",
	"Service does not have single node multi writer capability":   "node SINGLE_NODE_MULTI_WRITER",
	"Controller Service not provided: CreateVolume not supported": "plugin CONTROLLER_SERVICE",
	"GroupControllerService not supported":                        "plugin GROUP_CONTROLLER_SERVICE",
	"VolumeGroupSnapshots not supported":                          "plugin GROUP_CONTROLLER_SERVICE",
	"SNAPSHOT_ACCESSIBILITY_CONSTRAINTS not supported":            "plugin SNAPSHOT_ACCESSIBILITY_CONSTRAINTS",
	"node does not report accessible topology":                    "plugin VOLUME_ACCESSIBILITY_CONSTRAINTS",
}

// checkReport logs what became of every spec of one access type, and fails for each that was skipped without need.
func checkReport(t *testing.T, report ginkgo.Report, access string, driver driver) {
	var passed, failed, skipped int
	var lines []string
	for _, spec := range report.SpecReports.WithLeafNodeType(types.NodeTypeIt) {
		if spec.ContainerHierarchyTexts[0] != access {
			continue
		}
		line := fmt.Sprintf("%-7s %s", spec.State, spec.FullText())
		switch {
		case spec.State == types.SpecStatePassed:
			passed++
		case spec.Failed():
			failed++
		case spec.State == types.SpecStatePending:
			skipped++
			line += ": disabled by csi-test itself"
		case slices.ContainsFunc(driver.without, func(pattern string) bool {
			return regexp.MustCompile(pattern).MatchString(spec.FullText())
		}):
			skipped++
			line += ": not for this class"
		default:
			skipped++
			reason := spec.FailureMessage()
			line += ": " + reason
			if lacking, known := skips[reason]; !known {
				t.Errorf("skipped without a good reason: %s", line)
			} else if slices.Contains(driver.capabilities, lacking) {
				t.Errorf("skipped, though the driver has %q: %s", lacking, line)
			}
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	t.Logf("%s: %d run, %d passed, %d failed, %d skipped\n%s",
		access, passed+failed, passed, failed, skipped, strings.Join(lines, "\n"))
	if passed+failed == 0 {
		t.Errorf("%s: no spec was run", access)
	}
}

func TestCapabilitiesAreThoseOfTheTable(t *testing.T) {
	i := start(t)
	controller, node := connect(t, i.controllerSocket()), connect(t, i.nodeSocket())
	// The plugin as a whole says the same on each of its sockets.
	for socket, plugin := range map[string]*grpc.ClientConn{"controller": controller, "node": node} {
		found := advertised(t, plugin, controller, node)
		for _, capability := range i.driver.capabilities {
			if !slices.Contains(found, capability) {
				t.Errorf("with the plugin's capabilities from the %s socket: %q is not advertised", socket, capability)
			}
		}
		for _, capability := range found {
			if !slices.Contains(i.driver.capabilities, capability) {
				t.Errorf("with the plugin's capabilities from the %s socket: %q is advertised, but is not in the table", socket, capability)
			}
		}
	}
}

// advertised asks for all capabilities, each as the service that says it and the name that the specification gives.
func advertised(t *testing.T, plugin, controller, node *grpc.ClientConn) []string {
	t.Helper()
	ctx, cancel := context.WithTimeout(interrupted, startDeadline)
	defer cancel()
	var found []string
	p, err := csi.NewIdentityClient(plugin).GetPluginCapabilities(ctx, &csi.GetPluginCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, capability := range p.GetCapabilities() {
		if expansion := capability.GetVolumeExpansion(); expansion != nil {
			found = append(found, "plugin expansion "+expansion.GetType().String())
		} else {
			found = append(found, "plugin "+capability.GetService().GetType().String())
		}
	}
	c, err := csi.NewControllerClient(controller).ControllerGetCapabilities(ctx, &csi.ControllerGetCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, capability := range c.GetCapabilities() {
		found = append(found, "controller "+capability.GetRpc().GetType().String())
	}
	n, err := csi.NewNodeClient(node).NodeGetCapabilities(ctx, &csi.NodeGetCapabilitiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, capability := range n.GetCapabilities() {
		found = append(found, "node "+capability.GetRpc().GetType().String())
	}
	return found
}

func connect(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
